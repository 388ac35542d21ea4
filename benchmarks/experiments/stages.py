"""Stages that the experiments put around the models: weaker reasoners and a perfect one, a memory.

All are `ReasonerStage` or `EmbedderStage`. None can embed while it reasons, so that the embedder
reads what it is given, whole pictures included, whatever the reasoner saw.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from tte_jax.content import NO_REASONING, Content, Media, MediaKind, Reasoning, Side, Usage
from tte_jax.local import LocalReasoner
from tte_jax.preprocess.ecr import parse_ecr
from tte_jax.stages import EmbedderStage, EmbedItem, ReasonerStage, ReasonItem, Sampling


class Coarse:
    """A reasoner with bad eyes: pictures are shrunk to `side` pixels and enlarged again."""

    def __init__(self, inner: ReasonerStage, side: int) -> None:
        self.inner, self.side = inner, side

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        seen = [replace(item, content=coarse(item.content, self.side)) for item in items]
        return await self.inner.reason(seen, max_tokens=max_tokens, timeout_s=timeout_s)


def coarse(content: Content, side: int) -> Content:
    """The content with the detail of `side` x `side` pixels in each of its images."""
    return Content(
        tuple(
            Media(_shrunk(part.data, side))
            if isinstance(part, Media) and part.kind is MediaKind.IMAGE
            else part
            for part in content.parts
        )
    )


def _shrunk(data: bytes, side: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    small = image.resize((side, side), Image.Resampling.BOX)
    out = io.BytesIO()
    small.resize(image.size, Image.Resampling.BICUBIC).save(out, "PNG", compress_level=1)
    return out.getvalue()


class Sampled:
    """A reasoner that draws its words instead of taking the likeliest."""

    def __init__(self, inner: LocalReasoner, sampling: Sampling) -> None:
        self.inner, self.sampling = inner, sampling

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        return await self.inner.reason(
            items, max_tokens=max_tokens, timeout_s=timeout_s, sampling=self.sampling
        )


class Oracle:
    """The true ECR of everything that it was told about; nothing else is reasoned about."""

    def __init__(self) -> None:
        self.known: dict[tuple[Side, str], Reasoning] = {}

    def learn(self, side: Side, content: Content, ecr: str) -> None:
        self.known[side, content.content_hash] = parse_ecr(ecr)

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        del max_tokens, timeout_s
        found = [self.known.get((i.side, i.content.content_hash), NO_REASONING) for i in items]
        return found, Usage("reason", model_version="oracle")


class Noted:
    """Remembers the ECRs of candidates, to be counted afterwards.

    Attributes:
      answers: (content hash, budget) → the answer line.
    """

    def __init__(self, inner: ReasonerStage) -> None:
        self.inner = inner
        self.answers: dict[tuple[str, int], str] = {}

    async def reason(
        self, items: Sequence[ReasonItem], *, max_tokens: int, timeout_s: float | None = None
    ) -> tuple[list[Reasoning], Usage]:
        found, usage = await self.inner.reason(items, max_tokens=max_tokens, timeout_s=timeout_s)
        for item, reasoning in zip(items, found, strict=True):
            if item.background:
                self.answers[item.content.content_hash, max_tokens] = reasoning.answer
        return found, usage


class Remembered:
    """Embeds a candidate once, however many tasks and arms it occurs in."""

    def __init__(self, inner: EmbedderStage) -> None:
        self.inner = inner
        self.vectors: dict[tuple[str, str, str, int], np.ndarray] = {}

    async def embed(
        self, items: Sequence[EmbedItem], *, dimension: int = 0, timeout_s: float | None = None
    ) -> tuple[np.ndarray, Usage]:
        keys = [
            (item.content.content_hash, item.reasoning, item.instruction, dimension)
            for item in items
        ]
        known: Mapping[tuple[str, str, str, int], np.ndarray] = self.vectors
        fresh = [i for i, key in enumerate(keys) if not items[i].background or key not in known]
        made: dict[int, np.ndarray] = {}
        usage = Usage("embed")
        if fresh:
            vectors, usage = await self.inner.embed(
                [items[i] for i in fresh], dimension=dimension, timeout_s=timeout_s
            )
            made = dict(zip(fresh, vectors, strict=True))
            self.vectors |= {keys[i]: made[i] for i in fresh if items[i].background}
        rows = [made[i] if i in made else self.vectors[key] for i, key in enumerate(keys)]
        return np.stack(rows), usage
