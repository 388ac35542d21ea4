"""The reasoner: writes embedding-centric reasonings (ECRs) of queries and documents."""

from __future__ import annotations

import logging
import queue as thread_queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from tte_jax.content import NO_REASONING, Reasoning, Usage
from tte_jax.engine.batcher import RequestQueue, as_tte, complete
from tte_jax.engine.buckets import longest, smallest
from tte_jax.engine.inputs import model_input
from tte_jax.engine.jobs import Generated, Job, think_limit
from tte_jax.engine.next_token import Stops
from tte_jax.engine.role import Role, results, windows
from tte_jax.engine.served_model import ServedModel
from tte_jax.engine.slot_embedding import Continuation, continuation
from tte_jax.engine.slots import DecodeLoop
from tte_jax.engine.stop_texts import StopTexts
from tte_jax.engine.vision import VisionEncoder
from tte_jax.errors import InvalidInputError, UnsupportedError
from tte_jax.preprocess.ecr import END_THINK, parse_ecr
from tte_jax.preprocess.template import Prompt
from tte_jax.stages import GREEDY, Embedding, ReasonItem, Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """A few new tokens of input `index`; the texts of an input joined are its whole text."""

    index: int
    text: str
    tokens: int


@dataclass(frozen=True)
class Finished:
    """Input `index` is done. `usage` is its own share.

    `embedding` is there when it was asked for and could be made of the slot's cache.
    """

    index: int
    reasoning: Reasoning
    usage: Usage
    embedding: Embedding | None = None


class Reasoner(Role):
    """Embedding-centric reasoning with a hard token budget.

    The budget counts every new token. When the thinking would use it up, `</think>` and the
    answer's label are written by force early enough for a short answer (`slots.think_limit`). A
    budget that cannot even hold those, 0 included, means no reasoning: an empty ECR.
    """

    name = "reasoner"
    stage = "reason"

    def __init__(
        self,
        served: ServedModel,
        *,
        queue: RequestQueue | None = None,
        vision_cache_bytes: int = 256 * 2**20,
        prefix_cache_bytes: int = 64 * 2**20,
    ) -> None:
        super().__init__(served, queue=queue)
        prompts, config = served.prompts, served.config
        tokenizer = prompts.tokenizer
        self._forced = prompts.end_think_ids
        stops = Stops(
            stop=tuple(dict.fromkeys((*prompts.stop_ids, *config.eos_token_ids))),
            close_tag=tuple(tokenizer.encode_tagged(END_THINK)),
            forced_close=self._forced,
        )
        vision = None
        if config.vision is not None:
            vision = VisionEncoder(
                self.table, config.vision, served.buckets.images, cache_bytes=vision_cache_bytes
            )
        one_token = tokenizer.has_control(END_THINK)
        self.vision = vision
        self.loop = DecodeLoop(
            self.table,
            served.model,
            served.buckets,
            stops,
            vision=vision,
            prefix_cache_bytes=prefix_cache_bytes,
            queue=self.queue,
            is_closed=None if one_token else lambda ids: END_THINK in tokenizer.decode(ids),
            embeds=self.embeds,
        )

    @property
    def max_new_tokens(self) -> int:
        """The largest budget that this model is served with; a larger one is spent up to it."""
        return self.served.buckets.new_tokens

    @property
    def max_sequence_tokens(self) -> int:
        return self.served.buckets.cache_length

    @property
    def embeds(self) -> bool:
        """Whether the model is a unified one: it may embed as well, and as an embedder it reads on
        where the reasoner stopped, so that `prepare(embed=True)` costs a few tokens."""
        return "embedder" in self.served.roles and self.served.prompts.unified

    @property
    def dimension(self) -> int:
        """D of the embeddings; 0 for a model that only reasons."""
        return self.served.config.text.hidden_size if self.embeds else 0

    def check_embeds(self) -> None:
        """Raises UnsupportedError unless `embeds`."""
        if not self.embeds:
            raise UnsupportedError(
                f"{self.served.name} cannot embed what it has reasoned about: that takes a unified "
                "model, whose tte.json names both roles and whose embedder reads the reasoner's "
                "prompt on. Leave `embed` out and send the reasonings to the embedder",
                reason="NOT_UNIFIED",
            )

    def reason(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int = 64,
        *,
        sampling: Sampling = GREEDY,
    ) -> list[Reasoning]:
        """One ECR per item, in order. Blocking; any number of items.

        Raises:
          InvalidInputError: an item or the budget is wrong; `field` names which. A budget above
            `max_new_tokens` is not: that much of it is spent.
          InternalError: the model made NaN, or failed.
        """
        return self.run(items, max_tokens, sampling=sampling)[0]

    def run(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int = 64,
        *,
        sampling: Sampling = GREEDY,
    ) -> tuple[list[Reasoning], Usage]:
        """`reason` with what it cost."""
        finished = self._run(items, max_tokens, sampling=sampling)
        return [f.reasoning for f in finished], total(self.stage, self.version, finished)

    def reason_and_embed(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int = 64,
        *,
        sampling: Sampling = GREEDY,
    ) -> tuple[list[Reasoning], list[Embedding | None], Usage]:
        """`run`, and the embedding of each item with its ECR; None where `prepare` says so, or
        where the budget is too small for any reasoning.

        Raises: as `reason`, and UnsupportedError for a model that is not unified.
        """
        finished = self._run(items, max_tokens, sampling=sampling, embed=True)
        usage = total(self.stage, self.version, finished)
        return [f.reasoning for f in finished], [f.embedding for f in finished], usage

    def _run(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int,
        *,
        sampling: Sampling,
        embed: bool = False,
    ) -> list[Finished]:
        self.warmup()
        futures: list[Future[Finished]] = []
        try:
            for offset, window in windows(items):
                jobs = self.prepare_all(
                    lambda i, item, at=offset: self.prepare(
                        item,
                        max_tokens,
                        sampling=sampling,
                        embed=embed,
                        field=f"inputs[{at + i}].content",
                    ),
                    window,
                )
                futures += self.submit(jobs, wait=True)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return results(futures)

    def stream(
        self,
        items: Sequence[ReasonItem],
        max_tokens: int = 64,
        *,
        sampling: Sampling = GREEDY,
    ) -> Iterator[Delta | Finished]:
        """Deltas of all items as they come, and each item's `Finished`. Blocking iterator.

        Closing the iterator frees the slots.
        """
        self.warmup()
        events: thread_queue.SimpleQueue[Delta | Finished | BaseException] = (
            thread_queue.SimpleQueue()
        )
        jobs = self.prepare_all(
            lambda i, item: self.prepare(
                item, max_tokens, sampling=sampling, field=f"inputs[{i}].content"
            ),
            items,
        )
        futures = self.submit(jobs, wait=True, on_delta=events.put)

        def done(future: Future[Finished]) -> None:
            if not future.cancelled():
                events.put(future.exception() or future.result())

        for future in futures:
            future.add_done_callback(done)
        try:
            left = len(futures)
            while left:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= isinstance(event, Finished)
                yield event
        finally:
            for future in futures:
                future.cancel()

    def prepare(
        self,
        item: ReasonItem,
        max_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        embed: bool = False,
        field: str = "content",
    ) -> Job | None:
        """Decodes, patchifies and tokenises one item; host work for a pool thread.

        Args:
          embed: also embed the content with its ECR, from the slot's cache. The vector equals the
            embedder's; it is missing for a rewrite or a forced task, for a sequence longer than
            the embedder takes, and where much of the ECR has to be read again.

        Returns:
          What `submit` takes; None when the budget is too small for any reasoning.

        Raises:
          InvalidInputError: bad content, or a prompt above this model's limits.
          UnsupportedError: media for a text model, or `embed` of a model that is not unified.
        """
        if embed:
            self.check_embeds()
        if max_tokens < 0:
            raise InvalidInputError(
                f"max_tokens: {max_tokens} is below 0",
                field="max_tokens",
                limit=self.max_new_tokens,
            )
        # A budget is an upper bound, and a smaller one keeps it; `truncated` says where it bit.
        max_tokens = min(max_tokens, self.max_new_tokens)
        prompt = self.served.prompts.reason(item, field=field)
        one = model_input(prompt, self.served.config)
        smallest(one.tokens, (self.served.buckets.longest_prompt,), what="the prompt", field=field)
        if self.vision is not None:
            self.vision.check(one.images, field=field)
        close_at = think_limit(max_tokens, len(self._forced))
        if close_at is None:
            return None
        job = Job(
            one,
            max_tokens=max_tokens,
            close_at=close_at,
            background=item.background,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=StopTexts(sampling.stop, self.served.prompts.tokenizer.decode)
            if sampling.stop
            else None,
        )
        if not embed:
            return job
        return replace(job, embed=self._continuing(item, prompt, job))

    def _continuing(
        self, item: ReasonItem, prompt: Prompt, job: Job
    ) -> Callable[[list[int]], Continuation | None]:
        most = longest(self.served.buckets.embed)

        def continuing(tokens: list[int]) -> Continuation | None:
            text = self._text(job, tokens)
            wanted = self.served.prompts.embed_ids(item, prompt, parse_ecr(text).text)
            if wanted is None or len(wanted) > most:
                return None
            return continuation(job.input, tokens, wanted)

        return continuing

    def submit(
        self,
        jobs: Sequence[Job | None],
        *,
        deadline: float | None = None,
        wait: bool = False,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Future[Finished]]:
        """Queues prepared items as one request; cancelling a future frees its slot.

        Args:
          deadline: `time.monotonic()` instant.
          wait: block while the queue is full instead of raising `OverloadedError`.
          on_delta: called on the device thread; must not block.

        Raises:
          OverloadedError, UnavailableError: as `RequestQueue.put`, and before warm-up.
        """
        self.require_ready()
        todo: list[Job] = []
        for index, job in enumerate(jobs):
            if job is not None:
                listener = self._listener(index, job, on_delta) if on_delta else None
                todo.append(replace(job, on_tokens=listener) if listener else job)
        running = iter(self.loop.submit(todo, deadline=deadline, wait=wait) if todo else ())
        return [
            self._finish(index, job, None if job is None else next(running))
            for index, job in enumerate(jobs)
        ]

    def _listener(
        self, index: int, job: Job, on_delta: Callable[[Delta], None]
    ) -> Callable[[list[int], bool], None]:
        decoder = self.served.prompts.tokenizer.stream()
        shown = job.stop.stream() if job.stop else None

        def listen(ids: list[int], last: bool) -> None:
            text = decoder.push(ids) + (decoder.finish() if last else "")
            if shown is not None:
                text = shown.push(text, last=last)
            on_delta(Delta(index, text, len(ids)))

        return listen

    def _finish(
        self, index: int, job: Job | None, running: Future[Generated] | None
    ) -> Future[Finished]:
        """A future of the parsed result; cancelling it cancels the slot's."""
        out: Future[Finished] = Future()
        if job is None or running is None:
            usage = Usage(self.stage, model_version=self.version)
            out.set_result(Finished(index, NO_REASONING, usage))
            return out

        def inward(future: Future[Finished]) -> None:
            if future.cancelled():
                running.cancel()

        def outward(future: Future[Generated]) -> None:
            if future.cancelled():
                out.cancel()
            elif (error := future.exception()) is not None:
                complete(out, error=error)
            else:
                try:
                    complete(out, result=self._finished(index, job, future.result()))
                except Exception as error:  # nobody else would ever complete `out`
                    log.exception("a finished sequence could not be read")
                    complete(out, error=as_tte(error))

        out.add_done_callback(inward)
        running.add_done_callback(outward)
        return out

    def _finished(self, index: int, job: Job, made: Generated) -> Finished:
        text = self._text(job, made.tokens)
        reasoning = parse_ecr(text, tokens=len(made.tokens), truncated=made.forced)
        usage = Usage(
            self.stage,
            tokens_in=job.input.tokens,
            tokens_out=len(made.tokens),
            cached_tokens=made.cached_tokens,
            queue_s=made.queue_s,
            compute_s=made.compute_s,
            model_version=self.version,
        )
        embedding = None
        if (vector := made.embedding) is not None:
            spent = Usage(
                "embed",
                tokens_in=vector.tokens,
                cached_tokens=vector.reused,
                compute_s=vector.compute_s,
                model_version=self.version,
                within=self.stage,
            )
            embedding = Embedding(vector.vector, spent)
        return Finished(index, reasoning, usage, embedding)

    def _text(self, job: Job, tokens: list[int]) -> str:
        text = self.served.prompts.tokenizer.decode(tokens)
        return text if job.stop is None else job.stop.cut(text)

    def _start(self) -> None:
        self.loop.start()

    def _stop(self) -> None:
        self.loop.close()


def total(stage: str, version: str, finished: Sequence[Finished]) -> Usage:
    """One usage of a request: tokens add up, times overlap and so the longest counts."""
    parts = [f.usage for f in finished]
    return Usage(
        stage,
        tokens_in=sum(p.tokens_in for p in parts),
        tokens_out=sum(p.tokens_out for p in parts),
        cached_tokens=sum(p.cached_tokens for p in parts),
        queue_s=max((p.queue_s for p in parts), default=0.0),
        compute_s=max((p.compute_s for p in parts), default=0.0),
        model_version=version,
    )
