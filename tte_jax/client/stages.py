"""The models' stages over gRPC: the Protocols of `tte_jax.stages`, one channel each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from tte.v1 import (
    embedder_pb2,
    embedder_pb2_grpc,
    reasoner_pb2,
    reasoner_pb2_grpc,
    reranker_pb2,
    reranker_pb2_grpc,
)
from tte_jax import codec
from tte_jax.client.channel import Endpoint
from tte_jax.client.remote import Remote, answers
from tte_jax.client.retries import Attempts
from tte_jax.client.status import translated
from tte_jax.content import Content, Reasoning, Usage
from tte_jax.errors import InternalError, UnavailableError, UnsupportedError
from tte_jax.stages import GREEDY, Embedding, EmbedItem, Order, ReasonItem, Sampling


class RemoteReasoner(Remote):
    """`ReasonerStage` over a `ReasonerService`."""

    service = "tte.v1.ReasonerService"

    def __init__(self, endpoint: Endpoint | str) -> None:
        super().__init__(endpoint)
        self._stub = reasoner_pb2_grpc.ReasonerServiceStub(self.channel)
        self._reasons_only = ""  # a version that has refused to embed

    async def reason(
        self,
        items: Sequence[ReasonItem],
        *,
        max_tokens: int,
        timeout_s: float | None = None,
        sampling: Sampling = GREEDY,
    ) -> tuple[list[Reasoning], Usage]:
        reasonings, _, usage = await self._ask(items, max_tokens, timeout_s, sampling=sampling)
        return reasonings, usage

    async def reason_and_embed(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], list[Embedding | None], Usage]:
        left = Attempts(timeout_s)
        if not self._reasons_only:
            try:
                return await self._ask(items, max_tokens, left.timeout_s, embed=True)
            except UnsupportedError as error:
                if error.reason != "NOT_UNIFIED":
                    raise
        answer = await self._ask(items, max_tokens, left.timeout_s)
        version = answer[2].model_version
        # Another model may come up at this address, and is asked again.
        self._reasons_only = version if self._reasons_only in ("", version) else ""
        return answer

    async def _ask(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int,
        timeout_s: float | None,
        *,
        sampling: Sampling = GREEDY,
        embed: bool = False,
    ) -> tuple[list[Reasoning], list[Embedding | None], Usage]:
        request = reasoner_pb2.ReasonRequest(
            inputs=[codec.encode_reason_item(item) for item in items],
            max_tokens=max_tokens,
            omit_deltas=True,
            sampling=codec.encode_sampling(sampling),
            embed=embed,
        )
        attempts = Attempts(timeout_s)
        while True:
            try:
                return await self._answer(request, attempts.timeout_s)
            except UnavailableError as error:
                if (pause := attempts.pause_after(error)) is None:
                    raise
            await asyncio.sleep(pause)

    async def version(self, *, timeout_s: float | None = None) -> str:
        """Version of the model that reasons."""
        request = reasoner_pb2.ReasonerServiceInfoRequest()
        with translated(self.peer):
            about = await self._stub.Info(request, timeout=timeout_s, metadata=self.metadata)
        return about.model.model_version

    async def _answer(
        self, request: reasoner_pb2.ReasonRequest, timeout_s: float | None
    ) -> tuple[list[Reasoning], list[Embedding | None], Usage]:
        reasonings: list[Reasoning | None] = [None] * len(request.inputs)
        embeddings: list[Embedding | None] = [None] * len(request.inputs)
        usage = Usage("reason")
        with translated(self.peer):
            call = self._stub.Reason(request, timeout=timeout_s, metadata=self.metadata)
            try:
                async for response in call:
                    if response.HasField("result"):
                        result = response.result
                        if result.input_index < len(reasonings):
                            reasoning = codec.decode_reasoning(result.reasoning)
                            reasonings[result.input_index] = reasoning
                            if result.HasField("embedding"):
                                with answers(self.peer):
                                    embeddings[result.input_index] = codec.decode_embedding(
                                        result.embedding, f"results[{result.input_index}].embedding"
                                    )
                    elif response.HasField("usage"):
                        usage = codec.decode_usage(response.usage)
            finally:
                call.cancel()  # no effect on a call that has ended
        complete = [reasoning for reasoning in reasonings if reasoning is not None]
        if len(complete) < len(reasonings):
            raise InternalError(
                f"{self.peer} answered {len(complete)} of {len(reasonings)} inputs", stage="reason"
            )
        return complete, embeddings, usage


class RemoteEmbedder(Remote):
    """`EmbedderStage` over an `EmbedderService`."""

    service = "tte.v1.EmbedderService"

    def __init__(self, endpoint: Endpoint | str) -> None:
        super().__init__(endpoint)
        self._stub = embedder_pb2_grpc.EmbedderServiceStub(self.channel)

    async def embed(
        self, items: Sequence[EmbedItem], *, dimension: int = 0, timeout_s: float | None = None
    ) -> tuple[np.ndarray, Usage]:
        inputs = [codec.encode_embed_item(item) for item in items]
        request = embedder_pb2.EmbedRequest(inputs=inputs, dimension=dimension)
        with translated(self.peer):
            response = await self._stub.Embed(request, timeout=timeout_s, metadata=self.metadata)
        with answers(self.peer):
            vectors = [
                codec.decode_vector(vector, f"embeddings[{i}]")
                for i, vector in enumerate(response.embeddings)
            ]
        if len(vectors) != len(items) or len({len(vector) for vector in vectors}) != 1:
            raise InternalError(
                f"{self.peer} answered {len(items)} inputs with {len(vectors)} vectors of "
                f"{sorted({len(vector) for vector in vectors})} elements",
                stage="embed",
            )
        return np.stack(vectors), codec.decode_usage(response.usage)


class RemoteReranker(Remote):
    """`RerankerStage` over a `RerankerService`."""

    service = "tte.v1.RerankerService"

    def __init__(self, endpoint: Endpoint | str) -> None:
        super().__init__(endpoint)
        self._stub = reranker_pb2_grpc.RerankerServiceStub(self.channel)

    async def rerank(
        self,
        query: str | Content,
        candidates: Sequence[str | Content],
        *,
        instruction: str = "",
        timeout_s: float | None = None,
    ) -> tuple[np.ndarray, Usage]:
        request = reranker_pb2.RerankRequest(instruction=instruction)
        if isinstance(query, str):
            request.query = query
        else:
            request.query_content.CopyFrom(codec.encode_content(query))
        texts = [one for one in candidates if isinstance(one, str)]
        if len(texts) == len(candidates):
            request.candidates.extend(texts)
        else:
            contents = (Content.of(c) if isinstance(c, str) else c for c in candidates)
            request.candidate_contents.extend(codec.encode_content(c) for c in contents)
        with translated(self.peer):
            response = await self._stub.Rerank(request, timeout=timeout_s, metadata=self.metadata)
        return np.array(response.scores, np.float32), codec.decode_usage(response.usage)

    async def order(
        self,
        query: str,
        candidates: Sequence[str],
        *,
        instruction: str = "",
        timeout_s: float | None = None,
    ) -> tuple[Order, Usage]:
        """The listwise method, of a server that has it; others raise `UnsupportedError`."""
        request = reranker_pb2.RerankRequest(
            query=query,
            candidates=candidates,
            instruction=instruction,
            method=reranker_pb2.RERANK_METHOD_LISTWISE,
        )
        with translated(self.peer):
            response = await self._stub.Rerank(request, timeout=timeout_s, metadata=self.metadata)
        order = response.order
        return Order(tuple(order.indices), order.ranked), codec.decode_usage(response.usage)
