"""The embedder: content and its reasoning to one L2-normalised vector."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from tte_jax.content import Usage
from tte_jax.engine import programs
from tte_jax.engine.batcher import Batcher, Entry, RequestQueue, Room
from tte_jax.engine.buckets import longest, smallest
from tte_jax.engine.inputs import ModelInput, model_input, pack_rows, place_features
from tte_jax.engine.packing import PackedBatch, Rows, most_sequences, plan_packed, widest
from tte_jax.engine.role import Role, results, windows
from tte_jax.engine.served_model import ServedModel
from tte_jax.engine.vision import VisionEncoder
from tte_jax.errors import InternalError, InvalidInputError
from tte_jax.stages import EmbedItem


@dataclass(frozen=True, eq=False)
class EmbedJob:
    """One prepared input; in the `background`, it waits behind queries."""

    input: ModelInput
    background: bool = False


@dataclass(frozen=True, eq=False)
class Embedded:
    """One input's vector [D] float32 and what it cost (tokens; seconds)."""

    vector: np.ndarray
    tokens_in: int
    cached_tokens: int
    queue_s: float
    compute_s: float


class Embedder(Role):
    """Pools the last token of content + ECR; inputs of any lengths share the rows of a batch."""

    name = "embedder"
    stage = "embed"

    def __init__(
        self,
        served: ServedModel,
        *,
        queue: RequestQueue | None = None,
        vision_cache_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__(served, queue=queue)
        config, buckets = served.config, served.buckets
        self._shapes = buckets.embed
        self._dtype = np.dtype(served.model.text.norm_d[...].dtype)
        self.vision = None
        if config.vision is not None:
            self.vision = VisionEncoder(
                self.table, config.vision, buckets.images, cache_bytes=vision_cache_bytes
            )
        self._batcher: Batcher | None = None
        lay, vision = served.layout, self.vision is not None
        for rows, tokens in self._shapes:
            self.table.add(
                "embed",
                (rows, tokens),
                programs.embed,
                lay.rows(jnp.int32, rows, tokens),
                lay.rows(jnp.int32, rows, 3, tokens),
                lay.rows(jnp.int32, rows, tokens),
                lay.rows(jnp.int32, rows, most_sequences(tokens)),
                lay.whole(self._dtype, rows * tokens, config.feature_size) if vision else None,
                lay.rows(jnp.int32, rows, tokens) if vision else None,
                tokens=rows * tokens,
            )

    @property
    def dimension(self) -> int:
        """D, the length of a whole vector."""
        return self.served.config.text.hidden_size

    @property
    def max_sequence_tokens(self) -> int:
        return longest(self._shapes)

    def embed(self, items: Sequence[EmbedItem], dimension: int = 0) -> np.ndarray:
        """[B, D] float32, L2-normalised. Blocking; any number of items.

        Args:
          dimension: > 0 keeps the first so many elements and normalises again (Matryoshka).

        Raises:
          InvalidInputError: an item or the dimension is wrong; `field` names which.
          InternalError: the model made NaN, or failed.
        """
        return self.run(items, dimension)[0]

    def run(self, items: Sequence[EmbedItem], dimension: int = 0) -> tuple[np.ndarray, Usage]:
        """`embed` with what it cost."""
        self.check_dimension(dimension)
        self.warmup()
        futures: list[Future[Embedded]] = []
        try:
            for offset, window in windows(items):
                jobs = self.prepare_all(
                    lambda i, item, at=offset: self.prepare(
                        item, field=f"inputs[{at + i}].content"
                    ),
                    window,
                )
                futures += self.submit(jobs, wait=True)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return self.collect(results(futures), dimension)

    def prepare(self, item: EmbedItem, *, field: str = "content") -> EmbedJob:
        """Decodes, patchifies and tokenises one item; host work for a pool thread.

        Raises:
          InvalidInputError: bad content, or a sequence above this model's limits.
          UnsupportedError: media for a text model.
        """
        one = model_input(self.served.prompts.embed(item, field=field), self.served.config)
        smallest(
            one.tokens,
            (t for _, t in self._shapes),
            what="the content with its reasoning",
            field=field,
        )
        if self.vision is not None:
            self.vision.check(one.images, field=field)
        return EmbedJob(one, background=item.background)

    def submit(
        self, jobs: Sequence[EmbedJob], *, deadline: float | None = None, wait: bool = False
    ) -> list[Future[Embedded]]:
        """Queues prepared inputs as one request.

        Args:
          deadline: `time.monotonic()` instant.
          wait: block while the queue is full instead of raising `OverloadedError`.

        Raises:
          OverloadedError, UnavailableError: as `RequestQueue.put`, and before warm-up.
        """
        self.require_ready()
        entries = [
            Entry(
                job.input,
                cost=job.input.tokens,
                deadline=deadline,
                background=job.background,
            )
            for job in jobs
        ]
        if entries:
            self.queue.put(entries, wait=wait)
        return [e.future for e in entries]

    def collect(self, embedded: Sequence[Embedded], dimension: int = 0) -> tuple[np.ndarray, Usage]:
        """Results of one request as a matrix, cut to `dimension`, and their usage."""
        vectors = np.zeros((len(embedded), self.dimension), np.float32)
        for row, one in enumerate(embedded):
            vectors[row] = one.vector
        usage = Usage(
            self.stage,
            tokens_in=sum(e.tokens_in for e in embedded),
            cached_tokens=sum(e.cached_tokens for e in embedded),
            queue_s=max((e.queue_s for e in embedded), default=0.0),
            compute_s=max((e.compute_s for e in embedded), default=0.0),
            model_version=self.version,
        )
        return truncate(vectors, dimension), usage

    def check_dimension(self, dimension: int) -> None:
        """Raises InvalidInputError unless 0 <= dimension <= D."""
        if not 0 <= dimension <= self.dimension:
            raise InvalidInputError(
                f"dimension: {dimension} is outside 0 to {self.dimension}, the dimension of "
                f"{self.served.name}",
                field="dimension",
                limit=self.dimension,
            )

    def _room(self, oldest: Entry) -> Room:
        """The rows of the batch that the oldest entry opens; most tokens, if it fits them."""
        rows = Rows(widest(oldest.payload.tokens, self._shapes))
        return lambda entry: rows.add(entry.payload.tokens) is not None

    def _run_batch(self, entries: list[Entry]) -> list[Any]:
        out: list[Any] = [None] * len(entries)
        for batch in plan_packed([e.payload.tokens for e in entries], self._shapes):
            for index, result in self._run_packed(entries, batch):
                out[index] = result
        return out

    def _run_packed(
        self, entries: Sequence[Entry], batch: PackedBatch
    ) -> Iterator[tuple[int, Embedded | InternalError]]:
        """The results of a batch, with the index of each entry."""
        start = time.monotonic()
        shape, places = batch.shape, batch.places
        mine = [entries[place.index] for place in places]
        inputs: list[ModelInput] = [entry.payload for entry in mine]
        packed = pack_rows([entry.payload for entry in entries], batch)
        vis = vis_idx = None
        known: set[str] = set()
        if self.vision is not None:
            features, known = self.vision.features(i for one in inputs for i in one.images)
            vis, vis_idx = place_features(
                inputs,
                shape,
                features,
                width=self.served.config.feature_size,
                dtype=self._dtype,
                starts=[(place.row, place.start) for place in places],
            )
        z = np.asarray(self.table.run("embed", shape, *packed, vis, vis_idx))
        spent = time.monotonic() - start
        stats = self.queue.stats
        stats.ran(shape, mine, sum(one.tokens for one in inputs), used=batch.rows)
        merged = self.served.config.vision.merged if self.served.config.vision else 1
        for place, entry, one in zip(places, mine, inputs, strict=True):
            vector = z[place.row, place.number]
            if not np.isfinite(vector).all():
                yield (
                    place.index,
                    InternalError(
                        "the embedder produced a vector that is not finite", reason="NAN"
                    ),
                )
                continue
            cached = sum(len(i.patches) // merged for i in one.images if i.key in known)
            stats.cached_tokens += cached
            result = Embedded(vector.copy(), one.tokens, cached, entry.queue_s, spent)
            yield place.index, result

    def _start(self) -> None:
        self._batcher = Batcher(
            self._run_batch,
            max_batch=max(b * most_sequences(t) for b, t in self._shapes),
            room=self._room,
            queue=self.queue,
        )

    def _stop(self) -> None:
        if self._batcher is not None:
            self._batcher.close()


def truncate(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """The first `dimension` elements, normalised again; 0 or the whole length = unchanged."""
    if dimension in (0, vectors.shape[1]):
        return vectors
    cut = vectors[:, :dimension]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
