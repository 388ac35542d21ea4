"""Continuous batching: sequences enter and leave the decode slots while others go on.

One thread owns the device. Each round it frees the slots of callers who have gone, gives free slots
to what waits, reads a bounded part of the new prompts (`tte_jax.engine.prefill`), and decodes a few
tokens for all others in one dispatch. A cancelled or expired sequence therefore gives its slot back
within one dispatch, be it decoded or still read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tte_jax.engine import programs
from tte_jax.engine.batcher import Entry, RequestQueue, as_tte, complete
from tte_jax.engine.buckets import Buckets
from tte_jax.engine.decode_state import DecodeState, abstract_state, empty_state
from tte_jax.engine.executables import ExecutableTable
from tte_jax.engine.jobs import Generated, Job, control_of
from tte_jax.engine.next_token import NO_TOKEN, Stops
from tte_jax.engine.prefill import Dispatch, Filling, Prefill
from tte_jax.engine.prefix_cache import PrefixCache
from tte_jax.engine.slot_embedding import SlotEmbedder, SlotVector
from tte_jax.engine.vision import VisionEncoder
from tte_jax.errors import DeadlineExceededError, InternalError, TteError, UnavailableError
from tte_jax.models.multimodal import MultimodalLM

log = logging.getLogger(__name__)


@dataclass
class DecodeStats:
    """Counters since the start.

    Attributes:
      prefills: batches of whole prompts.
      appends: batches of pieces of prompts.
      dispatches: of decoding.
    """

    prefills: int = 0
    appends: int = 0
    dispatches: int = 0
    tokens_out: int = 0
    slot_steps: int = 0
    cancelled: int = 0
    embedded: int = 0


@dataclass(eq=False)
class _Occupant:
    entry: Entry
    job: Job
    filling: Filling
    counted: bool = False
    tokens: list[int] = field(default_factory=list)
    closed: bool = False
    forced: bool = False

    @property
    def decoding(self) -> bool:
        return not self.filling.left


class DecodeLoop:
    """Slots of one model behind a `RequestQueue`.

    Args:
      prefix_cache_bytes: device memory for the keys and values of shared beginnings of prompts.
      is_closed: says from the ids so far whether the thinking is over, for tokenizers that may
        spell `</think>` in several ways; None where the tag is one control token.
      embeds: whether jobs may ask for embeddings; compiles the programs for it.
    """

    def __init__(
        self,
        table: ExecutableTable,
        model: MultimodalLM,
        buckets: Buckets,
        stops: Stops,
        *,
        vision: VisionEncoder | None,
        prefix_cache_bytes: int = 64 * 2**20,
        queue: RequestQueue | None = None,
        is_closed: Callable[[list[int]], bool] | None = None,
        embeds: bool = False,
    ) -> None:
        self._table = table
        self._model = model
        self._buckets = buckets
        self._shapes = buckets.decode_shapes
        self._is_closed = is_closed
        self.queue = RequestQueue() if queue is None else queue
        self.stats = DecodeStats()
        self._slots: list[_Occupant | None] = [None] * buckets.slots
        self._state: DecodeState | None = None
        self._thread: threading.Thread | None = None
        self._abort = threading.Event()
        state = abstract_state(
            model, slots=buckets.slots, length=buckets.cache_length, layout=table.layout
        )
        self._prefill = Prefill(
            table,
            model,
            buckets,
            stops,
            state,
            vision=vision,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        self._declare(stops, state)
        self._embedder = SlotEmbedder(table, buckets, state) if embeds else None

    @property
    def active(self) -> int:
        """How many slots are taken now."""
        return sum(o is not None for o in self._slots)

    @property
    def prefixes(self) -> PrefixCache:
        """Shared beginnings of prompts that are kept."""
        return self._prefill.prefixes

    def start(self) -> None:
        """Allocates the caches and starts the thread; after the table's warm-up. Idempotent."""
        if self._thread is None:
            self._state = self._empty_state()  # now, so that too little memory is seen at once
            self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
            self._thread.start()

    def submit(
        self, jobs: Sequence[Job], *, deadline: float | None = None, wait: bool = False
    ) -> list[Future[Generated]]:
        """Queues the jobs as one request (all or none); cancel a future to free its slot.

        Raises: as `RequestQueue.put`.
        """
        entries = [
            Entry(
                job,
                cost=job.input.tokens + job.max_tokens,
                deadline=deadline,
                background=job.background,
            )
            for job in jobs
        ]
        self.queue.put(entries, wait=wait)
        return [e.future for e in entries]

    def close(self, timeout_s: float = 10.0) -> None:
        """Fails what waits, lets running sequences end within `timeout_s`, ends the thread."""
        for entry in self.queue.close():
            complete(entry.future, error=UnavailableError("the model is shutting down"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            self._abort.set()
            self._thread.join(timeout_s)

    def _declare(self, stops: Stops, state: DecodeState) -> None:
        b, lay = self._buckets, self._table.layout
        for rows, places in b.decode_shapes:
            self._table.add(
                "decode",
                (rows, places),
                partial(programs.decode, places=places, steps=b.decode_steps, stops=stops),
                state,
                lay.whole(jnp.int32, rows),
                lay.whole(jnp.bool_, rows),
                lay.whole(jnp.bool_, rows),
                donate=(0,),
                tokens=rows,
            )

    def _empty_state(self) -> DecodeState:
        b = self._buckets
        return empty_state(
            self._model, slots=b.slots, length=b.cache_length, layout=self._table.layout
        )

    def _work(self) -> None:
        while True:
            try:
                self._reap()
                free = [i for i, o in enumerate(self._slots) if o is None]
                idle = len(free) == len(self._slots)
                if free:
                    entries = self.queue.take(max_entries=len(free), block=idle, same_group=False)
                    self._seat(entries, free)
                    if idle and not entries and self.queue.closed:
                        return
                if self._abort.is_set():
                    self._fail_all(UnavailableError("the model is shutting down"))
                    return
                self._read()
                if any(o is not None and o.decoding for o in self._slots):
                    self._step()
            except Exception as error:
                # What was on the device is lost with its caches; the thread goes on.
                log.exception("a decode round failed")
                self._fail_all(as_tte(error))
                self._state = None
                self.prefixes.cache.clear()

    def _reap(self) -> None:
        now = time.monotonic()
        for slot, occupant in enumerate(self._slots):
            if occupant is None:
                continue
            entry = occupant.entry
            if entry.dead:
                self.stats.cancelled += 1
                self._slots[slot] = None
            elif entry.deadline is not None and now >= entry.deadline:
                complete(
                    entry.future,
                    error=DeadlineExceededError(
                        f"the deadline passed after {len(occupant.tokens)} of at most "
                        f"{occupant.job.max_tokens} tokens"
                    ),
                )
                self._slots[slot] = None

    def _seat(self, entries: list[Entry], free: list[int]) -> None:
        for entry, slot in zip(entries, free, strict=False):
            try:
                filling = self._prefill.start(entry.payload.input, slot)
            except Exception as error:
                self._refuse(entry, error)
                continue
            self._slots[slot] = _Occupant(entry, entry.payload, filling)

    def _read(self) -> None:
        """Reads of the new prompts what may be read before the next decode dispatch."""
        new = [o for o in self._slots if o is not None and not o.decoding]
        if not new:
            return
        # Slots are taken in no order; whoever came first is read first.
        new.sort(key=lambda o: o.entry.started_at)
        self._state = self._state or self._empty_state()
        fillings = [o.filling for o in new]
        for filling in fillings:
            cached = filling.cached_tokens
            self._state = self._prefill.restore(self._state, filling)
            self.queue.stats.cached_tokens += filling.cached_tokens - cached
        for dispatch in self._prefill.plan(fillings):
            self._run(dispatch)

    def _run(self, dispatch: Dispatch) -> None:
        occupants = [self._slots[f.slot] for f in dispatch.fillings]
        assert all(o is not None for o in occupants)
        some: list[_Occupant] = [o for o in occupants if o is not None]
        cached = sum(f.cached_tokens for f in dispatch.fillings)
        assert self._state is not None
        try:
            control = control_of([o.job for o in some], dispatch.results)
            self._state, *out = self._prefill.run(self._state, dispatch, control)
        except Exception as error:
            if self._state_lost():
                raise
            if len(some) == 1:
                self._slots[dispatch.fillings[0].slot] = None
                self._refuse(some[0].entry, error)
                return
            for filling in dispatch.fillings:  # so that only the one at fault fails
                for alone in self._prefill.plan([filling]):
                    self._run(alone)
            return
        if dispatch.program == "prefill":
            self.stats.prefills += 1
        else:
            self.stats.appends += 1
        fresh = [o.entry for o in some if not o.counted]
        stats = self.queue.stats
        stats.ran(dispatch.shape, fresh, sum(dispatch.counts), used=dispatch.rows)
        stats.cached_tokens += sum(f.cached_tokens for f in dispatch.fillings) - cached
        tokens, done, failed = jax.device_get(out)
        ended: list[int] = []
        for row, (occupant, count) in enumerate(zip(some, dispatch.counts, strict=True)):
            occupant.counted = True
            filling = occupant.filling
            if failed[row]:
                self._emit(filling.slot, [], done=True, failed=True)
                continue
            self._prefill.finish(self._state, filling, count)
            if occupant.decoding:
                occupant.forced = occupant.job.close_at <= 0
                if self._emit(filling.slot, [int(tokens[row])], bool(done[row]), failed=False):
                    ended.append(filling.slot)
        self._release(ended)

    def _refuse(self, entry: Entry, error: Exception) -> None:
        log.warning("a prompt could not be prefilled: %s", error, exc_info=error)
        complete(entry.future, error=as_tte(error))

    def _step(self) -> None:
        """A few tokens for all that decode, in a program of about as many rows."""
        live = [(i, o) for i, o in enumerate(self._slots) if o is not None and o.decoding]
        # The newest token of each is not in its slot yet.
        needed = max(o.job.input.tokens + len(o.tokens) - 1 for _, o in live)
        fits = (s for s in self._shapes if s[0] >= len(live) and s[1] >= needed)
        rows, places = next(fits)  # the whole always does
        slots = self._rows([i for i, _ in live], rows)
        row_of = {slot: row for row, slot in enumerate(slots.tolist())}
        alive, closed = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
        for slot, occupant in live:
            alive[row_of[slot]], closed[row_of[slot]] = True, occupant.closed
        start = time.monotonic()
        self._state, *out = self._table.run(
            "decode", (rows, places), self._state, slots, alive, closed
        )
        tokens, forced, done, failed = jax.device_get(out)
        self.stats.dispatches += 1
        self.stats.slot_steps += tokens.size
        self.queue.ran(int((tokens != NO_TOKEN).sum()), time.monotonic() - start)
        ended: list[int] = []
        for slot, occupant in live:
            row = row_of[slot]
            occupant.forced |= bool(forced[row] >= 0)
            new = [int(t) for t in tokens[:, row] if t != NO_TOKEN]
            if self._emit(slot, new, bool(done[row]), bool(failed[row])):
                ended.append(slot)
        self._release(ended)

    def _rows(self, live: Sequence[int], rows: int) -> np.ndarray:
        """The slots of a program of so many rows: those of `live`, and others that fill it up."""
        if rows == len(self._slots):
            return np.arange(rows, dtype=np.int32)
        others = [i for i in range(len(self._slots)) if i not in live]
        return np.array([*live, *others[: rows - len(live)]], np.int32)

    def _emit(self, slot: int, new: list[int], done: bool, failed: bool) -> bool:
        """Takes a slot's new tokens in; returns whether its sequence has ended."""
        occupant = self._slots[slot]
        assert occupant is not None
        entry = occupant.entry
        occupant.tokens.extend(new)
        self.stats.tokens_out += len(new)
        if failed:
            self._slots[slot] = None
            complete(
                entry.future,
                error=InternalError(
                    "the model produced logits that are not finite numbers", reason="NAN"
                ),
            )
            return False
        if not done and occupant.job.stop is not None:
            done = occupant.job.stop.reached(occupant.tokens)
        if new and occupant.job.on_tokens is not None and not entry.dead:
            try:
                occupant.job.on_tokens(new, done)
            except Exception as error:
                log.exception("a listener of generated tokens failed")
                complete(entry.future, error=as_tte(error))
        if not done and self._is_closed is not None and not occupant.closed:
            occupant.closed = self._is_closed(occupant.tokens)
        return done

    def _release(self, ended: Sequence[int]) -> None:
        """Completes the sequences of these slots, embedded if they ask for it, and frees them."""
        occupants = [(slot, o) for slot in ended if (o := self._slots[slot]) is not None]
        now = time.monotonic()
        embeddings = self._embed(occupants)
        for slot, occupant in occupants:
            entry = occupant.entry
            self._slots[slot] = None
            result = Generated(
                tokens=occupant.tokens,
                forced=occupant.forced,
                cached_tokens=occupant.filling.cached_tokens,
                queue_s=entry.queue_s,
                compute_s=now - entry.started_at,
                embedding=embeddings.get(slot),
            )
            if complete(entry.future, result=result):
                self.queue.stats.completed += 1

    def _embed(self, occupants: Sequence[tuple[int, _Occupant]]) -> dict[int, SlotVector]:
        """Embeddings by slot; without those that cannot be made here, which others then make."""
        if self._embedder is None or self._state is None:
            return {}
        made: dict[int, SlotVector] = {}
        try:
            wanted = [
                (slot, rest)
                for slot, o in occupants
                if o.job.embed and not o.entry.dead and (rest := o.job.embed(o.tokens))
            ]
            for (slot, _), one in zip(
                wanted, self._embedder.embed(self._state, wanted), strict=True
            ):
                if one is not None:
                    made[slot] = one
        except Exception:  # the reasonings are whole without it
            log.exception("slots could not be embedded")
        self.stats.embedded += len(made)
        self.queue.stats.cached_tokens += sum(one.reused for one in made.values())
        return made

    def _fail_all(self, error: TteError) -> None:
        for slot, occupant in enumerate(self._slots):
            if occupant is not None:
                complete(occupant.entry.future, error=error)
                self.queue.stats.failed += 1
                self._slots[slot] = None

    def _state_lost(self) -> bool:
        """Whether a program failed after it had taken the donated caches."""
        return self._state is None or any(x.is_deleted() for x in jax.tree.leaves(self._state))
