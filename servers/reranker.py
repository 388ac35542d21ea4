"""RerankerService: scores of candidates for a query, and hard negatives for training."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import grpc
import numpy as np

from servers import convert
from servers.model_service import model_info, model_service, open_role, time_left
from servers.runtime import Service
from servers.settings import Settings
from tte.v1 import reranker_pb2, reranker_pb2_grpc
from tte_jax.builtin import models
from tte_jax.content import Usage
from tte_jax.errors import InvalidInputError, UnsupportedError
from tte_jax.listwise import ListwiseReranker
from tte_jax.local import LocalListwise, LocalReranker
from tte_jax.mining import percent_of_positive
from tte_jax.reranker import Reranker

NAME = "tte.v1.RerankerService"


class RerankerServicer(reranker_pb2_grpc.RerankerServiceServicer):
    """The RPCs of `protos/tte/v1/reranker.proto` over a `Reranker`."""

    def __init__(self, reranker: Reranker, listwise: ListwiseReranker | None = None) -> None:
        self._stage = LocalReranker(reranker)
        self._listwise = None if listwise is None else LocalListwise(listwise)

    async def Rerank(
        self, request: reranker_pb2.RerankRequest, context: grpc.aio.ServicerContext
    ) -> reranker_pb2.RerankResponse:
        query, candidates, instruction = convert.rerank_arguments(request)
        if request.method == reranker_pb2.RERANK_METHOD_LISTWISE:
            if self._listwise is None:
                raise UnsupportedError(
                    "this reranker scores candidates one by one; start the service with "
                    "--listwise N to have lists ordered",
                    reason="NO_LISTWISE",
                )
            query, texts = convert.listwise_texts(query, candidates)
            order, usage = await self._listwise.order(
                query, texts, instruction=instruction, timeout_s=time_left(context)
            )
            return convert.order_response(order, usage)
        try:
            scores, usage = await self._stage.rerank(
                query, candidates, instruction=instruction, timeout_s=time_left(context)
            )
        except InvalidInputError as error:
            # The stage knows one name for texts and contents, the request has two.
            if request.HasField("query_content"):
                error.field = re.sub(r"^query\b", "query_content", error.field)
            if request.candidate_contents:
                error.field = re.sub(r"^candidates\b", "candidate_contents", error.field)
            raise
        return convert.rerank_response(scores, usage)

    async def MineNegatives(
        self,
        request_iterator: AsyncIterator[reranker_pb2.MineNegativesRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[reranker_pb2.MinedNegatives]:
        rules = reranker_pb2.MiningRules()
        # One query at a time: the next request is read when this answer has been taken, so
        # HTTP/2 flow control holds back a fast sender and a slow reader holds back the device.
        async for request in request_iterator:
            if request.HasField("rules"):
                rules = request.rules
            percent, hardest = convert.mining_rules(rules)
            query, texts, instruction = convert.mining_texts(request)
            scores, usage = await self._scored(query, texts, instruction, time_left(context))
            ids = [candidate.id for candidate in request.candidates]
            mined = percent_of_positive(
                scores[1:],
                float(scores[0]),
                threshold=percent,
                hardest=hardest,
                exclude=[i for i, one in enumerate(ids) if one == request.positive.id],
            )
            yield convert.mined_response(request, scores, mined, usage)

    async def _scored(
        self, query: str, texts: list[str], instruction: str, timeout_s: float | None
    ) -> tuple[np.ndarray, Usage]:
        """Scores of [positive, *candidates]; errors name the fields of a mining request."""
        try:
            return await self._stage.rerank(
                query, texts, instruction=instruction, timeout_s=timeout_s, background=True
            )
        except InvalidInputError as error:
            if found := re.fullmatch(r"candidates\[(\d+)\]", error.field):
                at = int(found[1])
                error.field = f"candidates[{at - 1}].text" if at else "positive.text"
            raise

    async def Info(
        self, request: reranker_pb2.RerankerServiceInfoRequest, context: grpc.aio.ServicerContext
    ) -> reranker_pb2.RerankerServiceInfoResponse:
        most = 0 if self._listwise is None else self._listwise.role.most
        return reranker_pb2.RerankerServiceInfoResponse(
            model=model_info(self._stage.role), max_listwise_candidates=most
        )


async def create(settings: Settings) -> Service:
    """Opens the model that `settings.reranker_model` names.

    Raises:
      NotFoundError, PreconditionError: no such model, or not one for this role.
    """
    role = await open_role(Reranker, settings, settings.reranker_model, models.RERANKER)
    listwise = ListwiseReranker(role.served, most=settings.listwise) if settings.listwise else None
    servicer = RerankerServicer(role, listwise)
    return model_service(
        role,
        NAME,
        lambda server: reranker_pb2_grpc.add_RerankerServiceServicer_to_server(servicer, server),
        {"prefix_cache_hits": lambda: role.prefix_cache.hits},
        beside=[] if listwise is None else [listwise],
    )
