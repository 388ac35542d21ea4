"""Which static shapes a process serves, and which of them a batch runs in. Pure functions.

A bucket is a shape that was compiled at warm-up. Rows and tokens are padded up to it, so the cost
of a batch is the bucket's size, not the input's: `plan_batches` therefore keeps inputs of about
the same length together and takes the shape in which each of them costs least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tte_jax.errors import InvalidInputError, PreconditionError

Shape = tuple[int, int]
AppendShape = tuple[int, int, int]

DISPATCH_TOKENS = 32
"""What running a program costs beyond its tokens, as so many of them: dispatch, and reading the
weights once. Measured on the built-in models on two cores: 1.4 to 2 ms, at 0.06 ms a token."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The ladder of one model directory; every entry is one executable.

    Attributes:
      images: (G, P): G images at a time, each of at most P patches. Groups keep attention cost
        linear in the number of images, where one long packed row would make it quadratic.
      prefill: (b, T): b rows of T tokens, in each of which whole prompts stand one behind the
        other, written into decode slots.
      append: (b, T, S): the next T tokens of b prompts, behind at most S earlier ones in their
        slots. The largest T is the chunk: longer prompts are read chunk by chunk, decoding in
        between, and prompts that begin with a kept prefix are read from its end. Empty = neither:
        every prompt is read whole.
      embed: (b, T): b rows of T tokens, in each of which whole sequences stand one behind the
        other; the largest T is also the longest sequence.
      prefix: S: tokens of a shared prefix: one query of the reranker; what many prompts of a
        reasoner with `append` begin with.
      score: (N, T): N candidates of at most T tokens behind one prefix.
      decode: (rows, S): so many slots over the first S places of their caches. The most rows are
        the number of slots; smaller shapes run while few slots decode (one query alone need not pay
        for all) and while all sequences are short (reading the caches is much of a step). The whole
        of it, (slots, `cache_length`), is always there.
      new_tokens: the largest token budget of one reasoning.
      decode_steps: tokens per slot and dispatch; also how late a cancellation is seen.
    """

    images: tuple[Shape, ...] = ()
    prefill: tuple[Shape, ...] = ()
    append: tuple[AppendShape, ...] = ()
    embed: tuple[Shape, ...] = ()
    prefix: tuple[int, ...] = ()
    score: tuple[Shape, ...] = ()
    decode: tuple[Shape, ...] = ((1, 112), (4, 112), (8, 112), (16, 112))
    new_tokens: int = 96
    decode_steps: int = 8

    @property
    def slots(self) -> int:
        return max(rows for rows, _ in self.decode)

    @property
    def decode_shapes(self) -> tuple[Shape, ...]:
        """`decode` within the caches, the whole included, cheapest first."""
        whole = (self.slots, self.cache_length)
        shapes = {(rows, min(places, self.cache_length)) for rows, places in self.decode}
        return tuple(sorted(shapes | {whole}, key=lambda shape: shape[0] * shape[1]))

    @property
    def chunk(self) -> int:
        """The most tokens of one prompt that are read in one dispatch where chunks are possible."""
        return max((t for _, t, _ in self.append), default=0)

    @property
    def longest_in_chunks(self) -> int:
        """The longest prompt that can be read chunk by chunk; 0 = none."""
        # Every start up to the largest S has a shape, and from there the rest must fit in one.
        return max((s, s + t) for _, t, s in self.append)[1] if self.append else 0

    @property
    def longest_prompt(self) -> int:
        """The longest prompt that can be read, whole or in chunks."""
        return max(longest(self.prefill), self.longest_in_chunks)

    @property
    def cache_length(self) -> int:
        """S of the decode cache: the longest prompt and the largest budget."""
        return self.longest_prompt + self.new_tokens

    def image_patches(self, role: str, merged: int) -> int:
        """The most patches that one image or video may make; 0 = no row of `images` is served.

        It fits the largest row, and half of the sequence that must hold its tokens: the other half
        is for text, an ECR and further images. Reasoner and embedder have one bound, since a
        unified model embeds what the reasoner read.

        Args:
          role: one of `served_model.ROLES`.
          merged: patches of one token.
        """
        if role == "reranker":
            sequences = (max(self.prefix, default=0), longest(self.score))
        else:
            sequences = (self.longest_prompt, longest(self.embed))
        room = [tokens // 2 * merged for tokens in sequences if tokens]
        return min([longest(self.images), *room])

    def replace(self, changes: Mapping[str, Any]) -> Buckets:
        """A copy with the given entries, as they stand in a model's `tte.json` (lists of lists).

        Raises:
          PreconditionError: an unknown key, or a size that is not a positive integer.
        """
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        for key, value in changes.items():
            if key not in known:
                raise PreconditionError(
                    f"buckets: unknown entry {key!r}; known are {', '.join(known)}"
                )
            known[key] = _parse(key, value, like=known[key])
        return Buckets(**known)


MINI = Buckets(
    images=((1, 64), (8, 64)),
    prefill=((1, 64), (1, 128), (4, 128)),
    embed=((1, 64), (1, 128), (8, 128), (1, 256)),
    prefix=(128,),
    score=((16, 64), (16, 128)),
)
"""Models of a few million parameters over 112 x 112 pixel images, on CPU cores."""

FULL = Buckets(
    images=((1, 1024), (4, 1024), (1, 4096)),
    prefill=((1, 512), (4, 512)),
    append=((1, 128, 512), (4, 128, 512), (1, 512, 512), (1, 512, 1536)),
    embed=((1, 512), (2, 1024), (8, 1024), (1, 2560)),
    prefix=(512, 1024),
    score=((16, 512), (8, 1024)),
    decode=((1, 1024), (4, 1024), (16, 1024)),
    new_tokens=512,
)
"""Real checkpoints (2B, 7B) on an accelerator."""


@dataclass(frozen=True)
class Batch:
    """`rows` (indices into the caller's list) run in the bucket `shape` = (rows, tokens)."""

    shape: Shape
    rows: tuple[int, ...]


def smallest(size: int, ladder: Iterable[int], *, what: str, field: str = "") -> int:
    """The smallest rung that holds `size`.

    Raises:
      InvalidInputError: `size` is above the largest rung; the message names both.
    """
    rungs = sorted(set(ladder))
    for rung in rungs:
        if size <= rung:
            return rung
    limit = rungs[-1] if rungs else 0
    raise InvalidInputError(
        f"{what}: {size} tokens, but this model is served with at most {limit}; "
        "shorten the input, or serve it with larger `buckets` in its tte.json",
        field=field,
        reason="TOO_LONG",
        tokens=size,
        limit=limit,
    )


def longest(table: Iterable[Shape]) -> int:
    """The largest token (or patch) count of a table of shapes; 0 when it is empty."""
    return max((t for _, t in table), default=0)


def plan_batches(lengths: Sequence[int], table: Sequence[Shape], *, what: str) -> list[Batch]:
    """Cuts inputs of the given lengths into batches of bucket shapes, shortest inputs first.

    Inputs whose smallest T is the same stand together; each batch then runs in the shape that is
    `cheapest`.

    Raises:
      InvalidInputError: an input is longer than every bucket.
    """
    by_tokens: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        tokens = smallest(lengths[row], (t for _, t in table), what=what)
        by_tokens.setdefault(tokens, []).append(row)
    batches = []
    for tokens, rows in by_tokens.items():
        while rows:
            shape = cheapest(len(rows), tokens, table)
            batches.append(Batch(shape, tuple(rows[: shape[0]])))
            rows = rows[shape[0] :]
    return batches


def cheapest(rows: int, tokens: int, table: Iterable[Shape]) -> Shape:
    """The shape of at least `tokens` tokens in which each of `rows` inputs costs least.

    One input alone therefore runs in a longer row rather than among 15 empty ones, and few inputs
    run one after the other where that is less work. Equal shapes: the one with most rows.

    Args:
      tokens: at most the largest T of the table.
    """
    fitting = [shape for shape in table if shape[1] >= tokens]

    def cost(shape: Shape) -> tuple[float, int]:
        return (shape[0] * shape[1] + DISPATCH_TOKENS) / min(shape[0], rows), -shape[0]

    return min(fitting, key=cost)


def _parse(key: str, value: Any, *, like: Any) -> Any:
    def positive(x: Any) -> int:
        if isinstance(x, bool) or not isinstance(x, int) or x < 1:
            raise PreconditionError(
                f"buckets.{key}: sizes are positive integers, but {x!r} was given"
            )
        return x

    if isinstance(like, int):
        return positive(value)
    if not isinstance(value, list | tuple):
        raise PreconditionError(f"buckets.{key}: expected a list, got {value!r}")
    if key == "prefix":
        return tuple(positive(x) for x in value)
    form = "triples [rows, tokens, earlier]" if key == "append" else "pairs [rows, tokens]"
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != len(form.split()) - 1:
            raise PreconditionError(f"buckets.{key}: expected {form}, got {entry!r}")
    return tuple(tuple(positive(x) for x in entry) for entry in value)
