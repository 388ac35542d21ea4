"""How prompts get into their slots: whole, sharing rows, or piece by piece behind what is there.

Between two decode dispatches at most one piece of the prompts that are read in pieces is read, and
of the whole ones as many tokens as a piece has: who decodes gets the next tokens within a bounded
time, however long the prompts are that came in meanwhile.

    prompt of 1,300 tokens, chunks of 512, others decoding (d = one dispatch for all of them)

        | 0 .. 512 | d | 512 .. 1024 | d | 1024 .. 1300, first token | d d d
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tte_jax.engine import programs
from tte_jax.engine.buckets import DISPATCH_TOKENS, AppendShape, Buckets, longest
from tte_jax.engine.decode_state import DecodeState
from tte_jax.engine.executables import ExecutableTable
from tte_jax.engine.inputs import ModelInput, pack_rows, pad_rows, place_features
from tte_jax.engine.next_token import Control, Stops
from tte_jax.engine.packing import PackedBatch, most_sequences, plan_packed
from tte_jax.engine.prefix_cache import Beginning, PrefixCache
from tte_jax.engine.vision import VisionEncoder
from tte_jax.models.multimodal import MultimodalLM

APART = 1.125
"""How much more the prompts without images may cost when they are read before the others."""


@dataclass(eq=False)
class Filling:
    """A prompt and how much of it is in its slot.

    Attributes:
      input: the prompt.
      slot: its slot.
      beginnings: those of it that can be kept for other prompts.
      filled: how many of its tokens are in the slot.
      cached_tokens: tokens whose work was saved: copied from a kept prefix, and behind that the
        vision tokens whose features were cached.
      held: features of an image that the newest piece ends within.
      known: keys of images whose features were cached when they were first needed.
    """

    input: ModelInput
    slot: int
    beginnings: tuple[Beginning, ...] = ()
    filled: int = 0
    cached_tokens: int = 0
    held: dict[str, np.ndarray] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)

    @property
    def left(self) -> int:
        return self.input.tokens - self.filled


@dataclass(frozen=True)
class Dispatch:
    """One run of "prefill" or "append": the next `counts` tokens of each of `fillings`.

    Attributes:
      key: of the executable.
      results: for how many prompts it answers; the first ones are `fillings`.
      batch: where whole prompts stand, by their place in `fillings`; None = a row for each.
    """

    program: str
    key: tuple[int, ...]
    fillings: tuple[Filling, ...]
    counts: tuple[int, ...]
    results: int
    batch: PackedBatch | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.key[0], self.key[1]

    @property
    def rows(self) -> int:
        """How many rows have something in them."""
        return len(self.fillings) if self.batch is None else self.batch.rows


_Batch = tuple[PackedBatch, tuple[Filling, ...]]


class Prefill:
    """The programs that read prompts, and the order in which these are read.

    Args:
      state: shapes of the slots.
      prefix_cache_bytes: bound of `prefixes`.

    Attributes:
      prefixes: beginnings that are kept; empty where the ladder has no `append`.
    """

    def __init__(
        self,
        table: ExecutableTable,
        model: MultimodalLM,
        buckets: Buckets,
        stops: Stops,
        state: DecodeState,
        *,
        vision: VisionEncoder | None,
        prefix_cache_bytes: int,
    ) -> None:
        self._table = table
        self._buckets = buckets
        self._vision = vision
        self._width = model.config.feature_size
        self._merged = 1 if model.config.vision is None else model.config.vision.merged
        self._dtype = np.dtype(model.text.norm_d[...].dtype)
        self._budget = max((b * t for b, t, _ in buckets.append), default=None)
        self._reach = max((s for _, _, s in buckets.append), default=0)
        self.prefixes = PrefixCache(
            table, buckets, state, merged=self._merged, max_bytes=prefix_cache_bytes
        )
        lay = table.layout
        for rows, tokens in buckets.prefill:
            most = self._most((rows, tokens))
            table.add(
                "prefill",
                (rows, tokens),
                partial(programs.prefill, stops=stops),
                state,
                lay.rows(jnp.int32, rows, tokens),
                lay.rows(jnp.int32, rows, 3, tokens),
                lay.rows(jnp.int32, rows, tokens),
                lay.rows(jnp.int32, rows, most_sequences(tokens)),
                lay.whole(self._dtype, rows * tokens, self._width) if vision else None,
                lay.rows(jnp.int32, rows, tokens) if vision else None,
                lay.whole(jnp.int32, 2, rows, tokens),
                lay.whole(jnp.int32, most),
                lay.whole(jnp.int32, most),
                lay.whole(jnp.int32, most),
                lay.whole(jnp.int32, most),
                jax.tree.map(lambda x, most=most: lay.whole(x.dtype, most), state.control),
                donate=(0,),
                tokens=rows * tokens,
            )
        for rows, tokens, places in buckets.append:
            # Whole on every device of a mesh, as in decoding: rows are few, and their slots' caches
            # are not split by rows.
            table.add(
                "append",
                (rows, tokens, places),
                partial(programs.append, places=places, stops=stops),
                state,
                lay.whole(jnp.int32, rows, tokens),
                lay.whole(jnp.int32, rows, 3, tokens),
                lay.whole(jnp.int32, rows),
                lay.whole(self._dtype, rows * tokens, self._width) if vision else None,
                lay.whole(jnp.int32, rows, tokens) if vision else None,
                lay.whole(jnp.int32, rows),
                lay.whole(jnp.int32, rows),
                lay.whole(jnp.bool_, rows),
                lay.whole(jnp.int32, rows),
                jax.tree.map(lambda x, rows=rows: lay.whole(x.dtype, rows), state.control),
                donate=(0,),
                tokens=rows * tokens,
            )

    def start(self, one: ModelInput, slot: int) -> Filling:
        """A prompt of which nothing is read.

        Raises:
          InternalError: images and vision tokens do not add up.
        """
        known = ()
        if one.prefix_ends and one.tokens <= self._buckets.longest_in_chunks:
            known = self.prefixes.beginnings(one)
        return Filling(one, slot, known)

    def restore(self, state: DecodeState, filling: Filling) -> DecodeState:
        """Copies the longest kept beginning into the slot where it has more than that already."""
        if not filling.beginnings:
            return state
        state, filled = self.prefixes.restore(
            state, filling.beginnings, filling.slot, beyond=filling.filled
        )
        if filled > filling.filled:
            filling.cached_tokens += filled - filling.filled
            filling.filled = filled
            filling.held = {}
        return state

    def plan(self, fillings: Sequence[Filling]) -> list[Dispatch]:
        """What is read before the next decode dispatch; at least one dispatch.

        A prompt waits while one before it reads the longest beginning that it could take over.

        Args:
          fillings: those with something left, in order of arrival.
        """
        ready: list[Filling] = []
        making: set[bytes] = set()
        for filling in fillings:
            missing = self.prefixes.missing(filling.beginnings, beyond=filling.filled)
            if missing and missing[-1].key in making:
                continue
            making.update(b.key for b in missing)
            ready.append(filling)
        whole = [f for f in ready if f.filled == 0 and self._fits_whole(f.input.tokens)]
        chosen = self._whole(whole)
        if pieces := [f for f in ready if f not in whole]:
            chosen.append(self._pieces(pieces))
        return chosen

    def run(
        self, state: DecodeState, dispatch: Dispatch, control: Control
    ) -> tuple[DecodeState, Any, Any, Any]:
        """Runs a dispatch; `state` is donated.

        Args:
          control: fresh values, one for each of the dispatch's `results`.

        Returns: as `programs.prefill`.
        """
        fillings, batch = dispatch.fillings, dispatch.batch
        pieces = [
            f.input.piece(f.filled, f.filled + n, merged=self._merged)
            for f, n in zip(fillings, dispatch.counts, strict=True)
        ]
        starts = None if batch is None else [(place.row, place.start) for place in batch.places]
        vis = vis_idx = None
        saved = [0] * len(pieces)
        if self._vision is not None:
            features, saved = self._features(self._vision, fillings, pieces)
            vis, vis_idx = place_features(
                pieces,
                dispatch.shape,
                features,
                width=self._width,
                dtype=self._dtype,
                starts=starts,
            )

        def column(values: Sequence[Any], dtype: Any = np.int32, fill: Any = 0) -> np.ndarray:
            out = np.full(dispatch.results, fill, dtype)
            out[: len(values)] = values
            return out

        # Out of range: what is not there is written nowhere.
        slots = column([f.slot for f in fillings], fill=self._buckets.slots)
        next_pos = column([f.input.next_pos for f in fillings])
        tokens: tuple[np.ndarray, ...]
        place: tuple[np.ndarray, ...]
        if batch is None:
            tokens = pad_rows(pieces, dispatch.shape)
            lasts = [f.left == n for f, n in zip(fillings, dispatch.counts, strict=True)]
            place = (slots, column([f.filled for f in fillings]), column(lasts, np.bool_))
        else:
            tokens = pack_rows(pieces, batch)
            per_row = most_sequences(dispatch.shape[1])
            which = column([place.row * per_row + place.number for place in batch.places])
            place = (self._cells(dispatch), which, slots, column(dispatch.counts))
        done = self._table.run(
            dispatch.program,
            dispatch.key,
            state,
            *tokens,
            vis,
            vis_idx,
            *place,
            next_pos,
            control,
        )
        for filling, count in zip(fillings, saved, strict=True):
            filling.cached_tokens += count
        return done

    def finish(self, state: DecodeState, filling: Filling, count: int) -> None:
        """Notes that `count` more tokens are in the slot, and keeps what they complete."""
        before = filling.filled
        filling.filled += count
        for beginning in self.prefixes.missing(filling.beginnings, beyond=before):
            if beginning.end <= filling.filled:
                self.prefixes.keep(state, beginning, filling.slot)

    def _most(self, shape: tuple[int, int]) -> int:
        """How many prompts a "prefill" of a shape answers for at most."""
        rows, tokens = shape
        return min(rows * most_sequences(tokens), self._buckets.slots)

    def _cells(self, dispatch: Dispatch) -> np.ndarray:
        """[2 B T]: the slot of each token of whole prompts, and its place there."""
        assert dispatch.batch is not None
        cells = np.full((2, *dispatch.shape), self._buckets.slots, np.int32)
        for at, filling in zip(dispatch.batch.places, dispatch.fillings, strict=True):
            part = slice(at.start, at.start + filling.input.tokens)
            cells[0, at.row, part] = filling.slot
            cells[1, at.row, part] = np.arange(filling.input.tokens)
        return cells

    def _fits_whole(self, tokens: int) -> bool:
        b = self._buckets
        in_pieces = b.chunk < tokens <= b.longest_in_chunks
        return tokens <= longest(b.prefill) and not in_pieces

    def _whole(self, fillings: Sequence[Filling]) -> list[Dispatch]:
        batches = self._batches(fillings)
        groups = [
            [f for f in fillings if bool(f.input.images) is images] for images in (False, True)
        ]
        apart = [batch for group in groups for batch in self._batches(group)]
        # Nobody should wait for the features of others' images, where that is not dear.
        if _cost(apart) <= APART * _cost(batches):
            batches = apart
        if self._budget is not None:  # what has waited longest is surely among what is read now
            since = {id(f): i for i, f in enumerate(fillings)}
            batches.sort(key=lambda batch: min(since[id(f)] for f in batch[1]))
        chosen: list[Dispatch] = []
        places = 0
        for batch, some in batches:
            shape = batch.shape
            places += shape[0] * shape[1]
            if chosen and self._budget is not None and places > self._budget:
                break
            counts = tuple(f.input.tokens for f in some)
            chosen.append(Dispatch("prefill", shape, some, counts, self._most(shape), batch))
        return chosen

    def _batches(self, fillings: Sequence[Filling]) -> list[_Batch]:
        """Batches of them all; the `places` of each count within its own fillings."""
        batches: list[_Batch] = []
        for batch in plan_packed([f.input.tokens for f in fillings], self._buckets.prefill):
            places = tuple(replace(place, index=i) for i, place in enumerate(batch.places))
            some = tuple(fillings[place.index] for place in batch.places)
            batches.append((replace(batch, places=places), some))
        return batches

    def _pieces(self, fillings: Sequence[Filling]) -> Dispatch:
        """The next piece of the first prompt, and of others that fit into the same shape.

        The shape is the one in which each of them costs least, of those that end the prompt; or, if
        none does, of those of most tokens.
        """
        first = fillings[0]
        shapes = [shape for shape in self._buckets.append if shape[2] >= first.filled]
        most = max(t for _, t, _ in shapes)

        def fitting(shape: AppendShape) -> list[Filling]:
            _, t, s = shape
            most_of_all = t >= self._buckets.chunk  # a long prompt is not cut into small pieces
            return [
                f for f in fillings if f.filled <= s and (f is first or most_of_all or f.left <= t)
            ]

        def cost(shape: AppendShape) -> tuple[float, int, int]:
            b, t, s = shape
            return (b * t + DISPATCH_TOKENS) / min(b, len(fitting(shape))), s, -b

        shape = min((s for s in shapes if s[1] >= min(first.left, most)), key=cost)
        rows, tokens, _ = shape
        some = tuple(fitting(shape)[:rows])
        # A piece that does not end its prompt ends where another shape can go on.
        counts = tuple(
            f.left if f.left <= tokens else min(tokens, self._reach - f.filled) for f in some
        )
        return Dispatch("append", shape, some, counts, results=rows)

    def _features(
        self, vision: VisionEncoder, fillings: Sequence[Filling], pieces: Sequence[ModelInput]
    ) -> tuple[dict[str, np.ndarray], list[int]]:
        """Features of all images in the pieces, and how many tokens of each the cache saved."""
        features, known = vision.features(
            i
            for f, piece in zip(fillings, pieces, strict=True)
            for i in piece.images
            if i.key not in f.held
        )
        for filling in fillings:
            features |= filling.held
        saved = []
        for filling, piece in zip(fillings, pieces, strict=True):
            filling.known |= {i.key for i in piece.images if i.key not in filling.held} & known
            rows = [len(features[i.key]) for i in piece.images]
            if rows:
                rows[0] -= piece.clipped[0]
                rows[-1] -= piece.clipped[1]
            counted = zip(piece.images, rows, strict=True)
            saved.append(sum(count for image, count in counted if image.key in filling.known))
            cut = piece.images[-1:] if piece.clipped[1] else ()
            filling.held = {i.key: features[i.key] for i in cut}
        return features, saved


def _cost(batches: Sequence[_Batch]) -> int:
    shapes = (batch.shape for batch, _ in batches)
    return sum(rows * tokens + DISPATCH_TOKENS for rows, tokens in shapes)
