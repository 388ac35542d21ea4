"""The listwise reranker: one model writes the order of all candidates.

It sees the candidates beside each other, which the pointwise reranker does not, and has no scores:
only an order, and how much of it the model really gave. A reply that is no order of the candidates
costs nothing but time, since what it leaves out keeps the order in which it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tte_jax.content import Usage
from tte_jax.engine.batcher import RequestQueue
from tte_jax.engine.buckets import smallest
from tte_jax.engine.inputs import model_input
from tte_jax.engine.jobs import Generated, Job
from tte_jax.engine.next_token import Stops
from tte_jax.engine.role import Role
from tte_jax.engine.served_model import ServedModel, open_model
from tte_jax.engine.slots import DecodeLoop
from tte_jax.errors import InvalidInputError, PreconditionError
from tte_jax.preprocess.ecr import END_THINK
from tte_jax.preprocess.prompts_list import longest_order, parse_order
from tte_jax.stages import Order

_SPARE_TOKENS = 8
"""For a model that spaces its list in another way than JSON usually is."""


@dataclass(frozen=True)
class ListJob:
    """A prepared list: the sequence to continue, and how many candidates it has."""

    job: Job
    candidates: int


class ListwiseReranker(Role):
    """Orders texts by generating a list.

    Args:
      served: a text model that follows instructions; its weights may serve the pointwise reranker
        at the same time.
      most: candidates of one list.

    Raises:
      PreconditionError: a list of so many is longer than `buckets.new_tokens`.
    """

    name = "reranker"
    stage = "rerank"

    def __init__(
        self, served: ServedModel, *, most: int, queue: RequestQueue | None = None
    ) -> None:
        super().__init__(served, queue=queue)
        self.most = most
        prompts, config = served.prompts, served.config
        if self._tokens(most) > served.buckets.new_tokens:
            raise PreconditionError(
                f"a list of {most} candidates takes {self._tokens(most)} tokens, and "
                f"{served.name} is served with at most {served.buckets.new_tokens} new ones; "
                "order fewer candidates, or raise `new_tokens` in the buckets of its tte.json",
                reason="LIST_TOO_LONG",
            )
        stops = Stops(
            stop=tuple(dict.fromkeys((*prompts.stop_ids, *config.eos_token_ids))),
            close_tag=tuple(prompts.tokenizer.encode_tagged(END_THINK)),
            forced_close=prompts.end_think_ids,  # never: no job here closes a thinking
        )
        self.loop = DecodeLoop(
            self.table, served.model, served.buckets, stops, vision=None, queue=self.queue
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, most: int = 20, **options: Any) -> Self:
        """Opens a model directory. Args, raises: as `engine.served_model.open_model`, and here."""
        return cls(open_model(directory, role=cls.name, **options), most=most)

    @property
    def max_new_tokens(self) -> int:
        return self._tokens(self.most)

    @property
    def max_sequence_tokens(self) -> int:
        return self.served.buckets.cache_length

    @property
    def accepts_media(self) -> bool:
        return False

    def order(
        self, query: str, candidates: Sequence[str], instruction: str = ""
    ) -> tuple[Order, Usage]:
        """The candidates' order and what it cost. Blocking.

        Args:
          query: text or ECR text, whose tags are removed.
          candidates: likewise, at most `most`.
          instruction: what counts as an answer; empty = the model's own.

        Raises: as `prepare` and `submit`, and InternalError when the model made NaN.
        """
        self.warmup()
        job = self.prepare(query, candidates, instruction)
        future = self.submit(job, wait=True)
        return self.collect(job, future.result())

    def prepare(self, query: str, candidates: Sequence[str], instruction: str = "") -> ListJob:
        """Tokenises; host work for a pool thread.

        Raises:
          InvalidInputError: an empty query, too many candidates, or texts too long together.
        """
        if len(candidates) > self.most:
            raise InvalidInputError(
                f"candidates: {len(candidates)} are more than the {self.most} that one list orders",
                field="candidates",
                limit=self.most,
            )
        prompts, buckets = self.served.prompts, self.served.buckets
        one = model_input(prompts.rerank_list(query, candidates, instruction), self.served.config)
        smallest(one.tokens, (buckets.longest_prompt,), what="the list", field="candidates")
        return ListJob(Job(one, max_tokens=self._tokens(len(candidates))), len(candidates))

    def submit(
        self, job: ListJob, *, deadline: float | None = None, wait: bool = False
    ) -> Future[Generated]:
        """Queues a prepared list; cancelling the future frees its slot.

        Raises: as `DecodeLoop.submit`, and UnavailableError before warm-up.
        """
        self.require_ready()
        (future,) = self.loop.submit([job.job], deadline=deadline, wait=wait)
        return future

    def collect(self, job: ListJob, made: Generated) -> tuple[Order, Usage]:
        """What the model wrote as an order, with its usage."""
        text = self.served.prompts.tokenizer.decode(made.tokens)
        indices, ranked = parse_order(text, job.candidates)
        usage = Usage(
            self.stage,
            tokens_in=job.job.input.tokens,
            tokens_out=len(made.tokens),
            cached_tokens=made.cached_tokens,
            queue_s=made.queue_s,
            compute_s=made.compute_s,
            model_version=self.version,
        )
        return Order(tuple(indices), ranked), usage

    def _tokens(self, candidates: int) -> int:
        tokenizer = self.served.prompts.tokenizer
        return len(tokenizer.encode_tagged(longest_order(candidates))) + _SPARE_TOKENS

    def _start(self) -> None:
        self.loop.start()

    def _stop(self) -> None:
        self.loop.close()
