"""Random requests of random shape for the model services, and how they are sent.

Numbers of inputs, lengths, pictures, budgets and options are all drawn; some requests are longer
than a model serves, and those must be refused as such.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from PIL import Image

from tte.v1 import (
    content_pb2,
    embedder_pb2,
    embedder_pb2_grpc,
    reasoner_pb2,
    reasoner_pb2_grpc,
    reranker_pb2,
    reranker_pb2_grpc,
)

ROLES = ("reasoner", "embedder", "reranker")
STUBS: dict[str, Callable[[grpc.aio.Channel], Any]] = {
    "reasoner": reasoner_pb2_grpc.ReasonerServiceStub,
    "embedder": embedder_pb2_grpc.EmbedderServiceStub,
    "reranker": reranker_pb2_grpc.RerankerServiceStub,
}
WORDS = "a smiling cat dog face with the dark red skin tone thing that is wanted yes no".split()
SIDES = (content_pb2.SIDE_QUERY, content_pb2.SIDE_DOCUMENT)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


@dataclass(frozen=True)
class Request:
    """One call: `method` of the service's stub and its message, or messages for a stream."""

    method: str
    message: Any

    def begin(self, stub: Any, timeout_s: float | None = None) -> Any:
        """The running call of `grpc.aio`."""
        message = self.message
        if isinstance(message, tuple):
            message = iter(message)
        return getattr(stub, self.method)(message, timeout=timeout_s)

    async def answers(self, stub: Any, timeout_s: float | None = None) -> list[Any]:
        """Sends it and returns all messages of the answer. Raises `grpc.aio.AioRpcError`."""
        call = self.begin(stub, timeout_s)
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            return [await call]
        return [message async for message in call]


def picture(rng: random.Random) -> bytes:
    """An image of random size, shape and file format, at most three times as long as wide."""
    width = rng.randint(20, 200)
    height = max(8, round(width * rng.uniform(1 / 3, 3)))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, rng.choice(FORMATS))
    return out.getvalue()


class Traffic:
    """Endless random requests for one role.

    Args:
      pictures: take pictures from these; None = a new one each time, which no cache has seen.
      most_words: of a text.
    """

    def __init__(
        self, role: str, *, seed: int, most_words: int = 10, pictures: list[bytes] | None = None
    ) -> None:
        self._rng = random.Random(f"{role}{seed}")
        self._words = most_words
        self._pictures = pictures
        self._draw = {"reasoner": self._reason, "embedder": self._embed, "reranker": self._rerank}[
            role
        ]

    def next(self) -> Request:
        return self._draw()

    def _text(self, least: int = 1) -> str:
        # One in thirty is far too long for any small model.
        most = self._words if self._rng.random() < 0.97 else 40 * self._words
        return " ".join(self._rng.choices(WORDS, k=self._rng.randint(least, most)))

    def _content(self) -> content_pb2.Content:
        rng = self._rng
        parts = []
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            data = rng.choice(self._pictures) if self._pictures else picture(rng)
            parts.append(content_pb2.Part(image=content_pb2.Image(data=data)))
        if not parts or rng.random() < 0.5:
            parts.append(content_pb2.Part(text=self._text()))
        return content_pb2.Content(parts=parts)

    def _reason(self) -> Request:
        rng = self._rng
        inputs = []
        for _ in range(rng.choice((1, 1, 1, 2, 3, 7))):
            one = reasoner_pb2.ReasonInput(content=self._content(), side=rng.choice(SIDES))
            if rng.random() < 0.2:
                context = reasoner_pb2.RewriteContext(query=self._content())
                context.query_reasoning = self._text(0)
                one.rewrite.CopyFrom(context)
            inputs.append(one)
        sampling = reasoner_pb2.Sampling()
        if rng.random() < 0.3:
            sampling = reasoner_pb2.Sampling(
                temperature=rng.uniform(0, 2), top_p=rng.uniform(0.1, 1), seed=rng.randrange(2**32)
            )
        if rng.random() < 0.1:
            sampling.stop.append(rng.choice(WORDS))
        return Request(
            "Reason",
            reasoner_pb2.ReasonRequest(
                inputs=inputs,
                max_tokens=rng.randint(1, 40),
                omit_deltas=rng.random() < 0.3,
                sampling=sampling,
            ),
        )

    def _embed(self) -> Request:
        rng = self._rng
        inputs = [
            embedder_pb2.EmbedInput(
                content=self._content(),
                side=rng.choice(SIDES),
                reasoning=self._text(0) if rng.random() < 0.5 else "",
            )
            for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 9, 20)))
        ]
        dimension = rng.choice((0, 0, rng.randint(1, 64)))
        return Request("Embed", embedder_pb2.EmbedRequest(inputs=inputs, dimension=dimension))

    def _rerank(self) -> Request:
        rng = self._rng
        texts = [self._text(0) for _ in range(rng.choice((1, 2, 5, 10, 17, 50)))]
        if rng.random() < 0.2:
            return Request(
                "MineNegatives",
                tuple(
                    reranker_pb2.MineNegativesRequest(
                        query_id=f"q{number}",
                        query=self._text(),
                        positive=reranker_pb2.MiningText(id="p", text=self._text()),
                        candidates=[
                            reranker_pb2.MiningText(id=f"d{i}", text=text)
                            for i, text in enumerate(texts)
                        ],
                    )
                    for number in range(rng.randint(1, 3))
                ),
            )
        instruction = self._text() if rng.random() < 0.2 else ""
        return Request(
            "Rerank",
            reranker_pb2.RerankRequest(
                query=self._text(), candidates=texts, instruction=instruction
            ),
        )
