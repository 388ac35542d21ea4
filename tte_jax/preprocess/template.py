"""How a prompt is put together: pieces of text, control tokens and media, encoded in one place.

Text of the template and text of the user go through the same encoder, which never yields a control
token; control tokens come only from `Special` pieces. Neighbouring texts are joined before they are
encoded, so that the ids equal those of the whole string wherever the user's text is innocent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tte_jax.content import NO_REASONING, Media, Reasoning, Side, Task
from tte_jax.errors import UnsupportedError
from tte_jax.preprocess.media import LoadMedia, Patches, media_key
from tte_jax.preprocess.patches import ImageConfig
from tte_jax.preprocess.tokenizer import TAGS, Tokenizer
from tte_jax.preprocess.video import VideoPatches

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


@dataclass(frozen=True)
class Special:
    """A control token, by its content."""

    token: str


@dataclass(frozen=True)
class Tagged:
    """Text in which `<think>` and `</think>` are the model's tokens, if it has them: an ECR."""

    text: str


@dataclass(frozen=True)
class MediaSlot:
    """One image, page or video: vision start, a pad per merged patch, vision end.

    A video is one such run of its own pads; with `frame_times`, a run for every temporal patch, its
    time in seconds before it (Qwen3-VL). `bare` leaves vision start and end away (VLM2Vec).
    """

    media: Media
    field: str = ""
    bare: bool = False


@dataclass(frozen=True)
class Ids:
    """Token ids as they are, such as what a tokenizer's own post-processor puts at the end."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class PrefixEnd:
    """What stands before is the same for many prompts: its keys and values are worth keeping.

    Stands where a tokenizer cuts anyhow: next to a `Special`, or between the end of a line and a
    text that begins with no space.
    """


Piece = str | Special | Tagged | MediaSlot | Ids | PrefixEnd


@dataclass(frozen=True)
class Prompt:
    """What a model reads.

    Attributes:
      ids: [T] int32, image pads expanded.
      images: (patches, grid) of every image, page or video, in order; with times in the prompt,
        of every temporal patch of a video by itself.
      image_keys: content hash of each of them; the key for cached vision features.
      seconds: of each of them, seconds between temporal patches; 0 for still pictures.
      text: the prompt as text, each image as one pad token: for logs and tests.
      prefix_ends: the number of ids before each `PrefixEnd`, ascending.
      plain_positions: pads that do not follow vision start get text positions, as in transformers
        up to 4.52 (`mrope_mode` "legacy").
    """

    ids: np.ndarray
    images: tuple[Patches, ...] = ()
    image_keys: tuple[str, ...] = ()
    seconds: tuple[float, ...] = ()
    text: str = ""
    prefix_ends: tuple[int, ...] = ()
    plain_positions: bool = False


@dataclass(frozen=True)
class Turn:
    """One input, resolved: what the wordings of a prompt set are built from.

    Attributes:
      task: what is asked for.
      side: query or document.
      media: the images of the input (of the candidate, for a rewrite).
      text: its text, stripped.
      instruction: the caller's task description, or empty.
      seen: rewrite only: the candidate as it was described before.
      wanted: rewrite only: the query, as its ECR or its text.
    """

    task: Task
    side: Side
    media: tuple[MediaSlot, ...] = ()
    text: str = ""
    instruction: str = ""
    seen: Reasoning = NO_REASONING
    wanted: Reasoning = NO_REASONING


@dataclass
class _Assembly:
    ids: list[int] = field(default_factory=list)
    pending: str = ""
    images: list[Patches] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    text: str = ""
    prefix_ends: list[int] = field(default_factory=list)


def assemble(
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    *,
    config: ImageConfig | None = None,
    load: LoadMedia | None = None,
    frame_times: bool = False,
    plain_positions: bool = False,
) -> Prompt:
    """Encode the pieces.

    Args:
      frame_times: videos as Qwen3-VL reads them, frame by frame with their times.
      plain_positions: see `Prompt`.

    Raises:
      UnsupportedError: there is an image, but the model has no vision tower.
      PreconditionError: the tokenizer lacks a control token.
      InvalidInputError: an image is bad.
    """
    out = _Assembly()

    def flush() -> None:
        out.ids.extend(tokenizer.encode(out.pending))
        out.pending = ""

    def control(token: str) -> None:
        flush()
        out.ids.append(tokenizer.token_id(token))

    def run(patches: Patches, key: str, seconds: float, pad: str, *, bare: bool) -> None:
        assert config is not None
        ends = (None, None) if bare else (VISION_START, VISION_END)
        if ends[0]:
            control(ends[0])
        flush()
        out.ids.extend([tokenizer.token_id(pad)] * config.tokens(patches[1]))
        if ends[1]:
            control(ends[1])
        out.images.append(patches)
        out.keys.append(key)
        out.seconds.append(seconds)
        out.text += (ends[0] or "") + pad + (ends[1] or "")

    def place(slot: MediaSlot) -> None:
        if config is None or load is None:
            raise UnsupportedError(
                "this model reads text only, and the input has an image", reason="NO_VISION"
            )
        loaded, key = load(slot.media, slot.field), media_key(slot.media)
        if not isinstance(loaded, VideoPatches):
            run(loaded, key, 0.0, IMAGE_PAD, bare=slot.bare)
            return
        if not frame_times:
            both = (loaded.patches, loaded.grid)
            run(both, key, loaded.seconds_per_patch, VIDEO_PAD, bare=slot.bare)
            return
        t, rows, columns = loaded.grid
        frames = loaded.patches.reshape(t, rows * columns, -1)
        for i, (frame, seconds) in enumerate(zip(frames, loaded.times, strict=True)):
            out.pending += f"<{seconds:.1f} seconds>"
            out.text += f"<{seconds:.1f} seconds>"
            run((frame, (1, rows, columns)), f"{key}:{i}", 0.0, VIDEO_PAD, bare=slot.bare)

    for piece in pieces:
        match piece:
            case str():
                out.pending += piece
                out.text += piece
            case Special(token):
                control(token)
                out.text += token
            case Ids(ids):
                flush()
                out.ids.extend(ids)
            case Tagged(text):
                for part in tokenizer.split_tags(text):
                    if part in TAGS and tokenizer.has_control(part):
                        control(part)
                    else:
                        out.pending += part
                out.text += text
            case MediaSlot():
                place(piece)
            case PrefixEnd():
                flush()
                out.prefix_ends.append(len(out.ids))
    flush()
    return Prompt(
        ids=np.array(out.ids, np.int32),
        images=tuple(out.images),
        image_keys=tuple(out.keys),
        seconds=tuple(out.seconds),
        text=out.text,
        prefix_ends=tuple(out.prefix_ends),
        plain_positions=plain_positions,
    )
