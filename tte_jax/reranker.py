"""The reranker: P(yes) that a candidate's text answers a query's text (ECRR).

A model whose published format has a place for media (Qwen3-VL-Reranker) also reads contents.
Instruction and query stand first and are the same for all candidates of a query: they are read
once, and every candidate attends to the same keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from tte_jax.content import Content, Usage
from tte_jax.engine import programs
from tte_jax.engine.batcher import Batcher, Entry, RequestQueue
from tte_jax.engine.buckets import cheapest, longest, smallest
from tte_jax.engine.cache import ByteLru
from tte_jax.engine.inputs import ModelInput, model_input, pad_rows, place_features
from tte_jax.engine.role import Role, results, windows
from tte_jax.engine.served_model import ServedModel
from tte_jax.engine.vision import VisionEncoder
from tte_jax.errors import InternalError
from tte_jax.models.text import KVCache


@dataclass(frozen=True, eq=False)
class ScoreJob:
    """One candidate behind its query's prefix."""

    prefix: ModelInput
    suffix: ModelInput
    prefix_key: bytes


@dataclass(frozen=True)
class Scored:
    """P(yes) and what it cost (tokens; seconds)."""

    score: float
    tokens_in: int
    cached_tokens: int
    queue_s: float
    compute_s: float


class Reranker(Role):
    """Pointwise yes/no, with the query's keys and values shared and cached."""

    name = "reranker"
    stage = "rerank"
    max_queued = 4096  # texts are small, and one request may bring 256

    def __init__(
        self,
        served: ServedModel,
        *,
        queue: RequestQueue | None = None,
        prefix_cache_bytes: int = 64 * 2**20,
        vision_cache_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__(served, queue=queue)
        c, b = served.config.text, served.buckets
        self._prefixes, self._shapes = b.prefix, b.score
        self._batcher: Batcher | None = None
        dtype = self._dtype = np.dtype(served.model.text.norm_d[...].dtype)
        self.vision = None
        if served.config.vision is not None:
            self.vision = VisionEncoder(
                self.table, served.config.vision, b.images, cache_bytes=vision_cache_bytes
            )
        # A large model's prefix alone can be above the bound, and a request of several batches
        # needs its own until its end.
        largest = 2 * c.layers * max(self._prefixes) * c.kv_heads * c.head_dim
        self.prefix_cache: ByteLru[KVCache] = ByteLru(
            max(prefix_cache_bytes, largest * dtype.itemsize),
            lambda kv: kv.k.nbytes + kv.v.nbytes,
        )
        score = partial(programs.score, yes_id=served.prompts.yes_id, no_id=served.prompts.no_id)

        lay, vision, width = served.layout, self.vision is not None, served.config.feature_size
        for length in self._prefixes:
            self.table.add(
                "prefix",
                length,
                programs.prefix,
                lay.whole(jnp.int32, 1, length),
                lay.whole(jnp.int32, 1, 3, length),
                lay.whole(jnp.int32, 1),
                lay.whole(dtype, length, width) if vision else None,
                lay.whole(jnp.int32, 1, length) if vision else None,
                tokens=length,
            )
            cache: Any = lay.cache(c, dtype, 1, length)
            filled: Any = lay.whole(jnp.int32, 1)
            before = KVCache(k=cache, v=cache, length=filled)
            for rows, tokens in self._shapes:
                self.table.add(
                    "score",
                    (rows, tokens, length),
                    score,
                    before,
                    lay.rows(jnp.int32, rows, tokens),
                    lay.rows(jnp.int32, rows, 3, tokens),
                    lay.rows(jnp.int32, rows),
                    lay.whole(dtype, rows * tokens, width) if vision else None,
                    lay.rows(jnp.int32, rows, tokens) if vision else None,
                    tokens=rows * tokens,
                )

    @property
    def max_sequence_tokens(self) -> int:
        return max(self._prefixes) + longest(self._shapes)

    @property
    def accepts_media(self) -> bool:
        return super().accepts_media and self.served.prompts.rerank_media

    def score(
        self,
        query: str | Content,
        candidates: Sequence[str | Content],
        instruction: str = "",
    ) -> np.ndarray:
        """[N] float32 P(yes) in [0, 1], in the candidates' order. Blocking.

        Args:
          query: text or ECR text, whose tags are removed; a content where `accepts_media`.
          candidates: likewise.
          instruction: what counts as an answer; empty = the model's own.

        Raises:
          InvalidInputError: an empty query, or one too long; `field` names which.
          UnsupportedError: media for a reranker of texts.
          InternalError: the model made NaN, or failed.
        """
        return self.run(query, candidates, instruction)[0]

    def run(
        self,
        query: str | Content,
        candidates: Sequence[str | Content],
        instruction: str = "",
    ) -> tuple[np.ndarray, Usage]:
        """`score` with what it cost."""
        self.warmup()
        futures: list[Future[Scored]] = []
        try:
            for offset, window in windows(candidates):
                jobs = self.prepare(query, window, instruction, offset=offset)
                futures += self.submit(jobs, wait=True)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return self.collect(results(futures))

    def prepare(
        self,
        query: str | Content,
        candidates: Sequence[str | Content],
        instruction: str = "",
        *,
        offset: int = 0,
    ) -> list[ScoreJob]:
        """Decodes and tokenises a query and its candidates; host work for a pool thread.

        Raises: as `score`.
        """
        prompts, config = self.served.prompts, self.served.config
        prefix = model_input(prompts.rerank_prefix(query, instruction), config)
        smallest(prefix.tokens, self._prefixes, what="the query", field="query")
        self._check_images(prefix, "query")
        key = b"".join([prefix.ids.tobytes(), *(i.key.encode() for i in prefix.images)])
        jobs = []
        for index, candidate in enumerate(candidates, start=offset):
            field = f"candidates[{index}]"
            suffix = model_input(
                prompts.rerank_suffix(candidate, field=field), config, start=prefix.next_pos
            )
            smallest(suffix.tokens, (t for _, t in self._shapes), what="the candidate", field=field)
            self._check_images(suffix, field)
            jobs.append(ScoreJob(prefix, suffix, key))
        return jobs

    def _check_images(self, one: ModelInput, field: str) -> None:
        if self.vision is not None:
            self.vision.check(one.images, field=field)

    def submit(
        self,
        jobs: Sequence[ScoreJob],
        *,
        deadline: float | None = None,
        background: bool = False,
        wait: bool = False,
    ) -> list[Future[Scored]]:
        """Queues prepared candidates as one request.

        Args:
          deadline: `time.monotonic()` instant.
          background: waits behind searches; for mining.
          wait: block while the queue is full instead of raising `OverloadedError`.

        Raises:
          OverloadedError, UnavailableError: as `RequestQueue.put`, and before warm-up.
        """
        self.require_ready()
        entries = []
        for job in jobs:
            tokens = smallest(job.suffix.tokens, (t for _, t in self._shapes), what="the candidate")
            entries.append(
                Entry(
                    job,
                    cost=job.suffix.tokens,
                    group=(job.prefix_key, tokens),
                    max_batch=max(n for n, t in self._shapes if t == tokens),
                    deadline=deadline,
                    background=background,
                )
            )
        if entries:
            self.queue.put(entries, wait=wait)
        return [e.future for e in entries]

    def collect(self, scored: Sequence[Scored]) -> tuple[np.ndarray, Usage]:
        """Results of one request as [N] float32, and their usage."""
        usage = Usage(
            self.stage,
            tokens_in=sum(s.tokens_in for s in scored),
            cached_tokens=sum(s.cached_tokens for s in scored),
            queue_s=max((s.queue_s for s in scored), default=0.0),
            compute_s=max((s.compute_s for s in scored), default=0.0),
            model_version=self.version,
        )
        return np.array([s.score for s in scored], np.float32), usage

    def _run_batch(self, entries: list[Entry]) -> list[Any]:
        start = time.monotonic()
        jobs: list[ScoreJob] = [e.payload for e in entries]
        rows, tokens = cheapest(len(jobs), entries[0].group[1], self._shapes)
        if rows < len(jobs):
            return [*self._run_batch(entries[:rows]), *self._run_batch(entries[rows:])]
        before, was_cached = self._prefix(jobs[0])
        arguments = self._arguments([j.suffix for j in jobs], (rows, tokens))
        length = before.k.shape[2]
        scores = np.asarray(self.table.run("score", (rows, tokens, length), before, *arguments))
        spent = time.monotonic() - start
        stats = self.queue.stats
        stats.ran((rows, tokens), entries, sum(j.suffix.tokens for j in jobs))
        out: list[Any] = []
        for row, (entry, job) in enumerate(zip(entries, jobs, strict=True)):
            if not np.isfinite(scores[row]):
                out.append(
                    InternalError("the reranker produced a score that is not finite", reason="NAN")
                )
                continue
            shared = job.prefix.tokens
            stats.cached_tokens += shared if was_cached or row else 0
            out.append(
                Scored(
                    score=float(scores[row]),
                    tokens_in=shared + job.suffix.tokens,
                    cached_tokens=shared if was_cached or row else 0,
                    queue_s=entry.queue_s,
                    compute_s=spent,
                )
            )
        return out

    def _prefix(self, job: ScoreJob) -> tuple[KVCache, bool]:
        found = self.prefix_cache.get(job.prefix_key)
        if found is not None:
            return found, True
        length = smallest(job.prefix.tokens, self._prefixes, what="the query")
        made: KVCache = self.table.run(
            "prefix", length, *self._arguments([job.prefix], (1, length))
        )
        self.prefix_cache.put(job.prefix_key, made)
        return made, False

    def _arguments(self, inputs: Sequence[ModelInput], shape: tuple[int, int]) -> tuple[Any, ...]:
        """ids, positions, n and, for a model with a tower, vis and vis_idx; else None for both."""
        ids, positions, n = pad_rows(inputs, shape)
        if self.vision is None:
            return ids, positions, n, None, None
        features, _ = self.vision.features(i for one in inputs for i in one.images)
        width = self.served.config.feature_size
        vis = place_features(inputs, shape, features, width=width, dtype=self._dtype)
        return ids, positions, n, *vis

    def _start(self) -> None:
        self._batcher = Batcher(
            self._run_batch, max_batch=max(n for n, _ in self._shapes), queue=self.queue
        )

    def _stop(self) -> None:
        if self._batcher is not None:
            self._batcher.close()
