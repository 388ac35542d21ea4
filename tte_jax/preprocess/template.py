"""How a prompt is put together: pieces of text, control tokens and media, encoded in one place.

Text of the template and text of the user go through the same encoder, which never yields a control
token; control tokens come only from `Special` pieces. Neighbouring texts are joined before they are
encoded, so that the ids equal those of the whole string wherever the user's text is innocent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tte_jax.content import NO_REASONING, Media, MediaKind, Reasoning, Side, Task
from tte_jax.errors import UnsupportedError
from tte_jax.limits import MAX_IMAGE_PIXELS
from tte_jax.preprocess.image import decode_image
from tte_jax.preprocess.patches import Grid, ImageConfig, patchify
from tte_jax.preprocess.tokenizer import TAGS, Tokenizer

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

Patches = tuple[np.ndarray, Grid]
"""([n, C*Tp*p*p] float32, grid) of one image."""

LoadMedia = Callable[[Media, str], Patches]
"""Media and the path of its field → patches. A cache keyed by `Media.sha256` fits in here."""


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
    """One image: vision start, a pad per merged patch, vision end."""

    media: Media
    field: str = ""


@dataclass(frozen=True)
class PrefixEnd:
    """What stands before is the same for many prompts; must be next to a `Special`."""


Piece = str | Special | Tagged | MediaSlot | PrefixEnd


@dataclass(frozen=True)
class Prompt:
    """What a model reads.

    Attributes:
      ids: [T] int32, image pads expanded.
      images: (patches, grid) of every image, in order.
      image_keys: content hash of every image, in order; the key for cached vision features.
      text: the prompt as text, each image as one pad token: for logs and tests.
      prefix_length: how many leading ids are shared by all prompts of the same kind; 0 = none.
    """

    ids: np.ndarray
    images: tuple[Patches, ...] = ()
    image_keys: tuple[str, ...] = ()
    text: str = ""
    prefix_length: int = 0


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
    text: str = ""
    prefix_length: int = 0


def assemble(
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    *,
    config: ImageConfig | None = None,
    load: LoadMedia | None = None,
) -> Prompt:
    """Encode the pieces.

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

    for piece in pieces:
        match piece:
            case str():
                out.pending += piece
                out.text += piece
            case Special(token):
                control(token)
                out.text += token
            case Tagged(text):
                for part in tokenizer.split_tags(text):
                    if part in TAGS and tokenizer.has_control(part):
                        control(part)
                    else:
                        out.pending += part
                out.text += text
            case MediaSlot(media, path):
                if config is None or load is None:
                    raise UnsupportedError(
                        "this model reads text only, and the input has an image", reason="NO_VISION"
                    )
                patches = load(media, path)
                control(VISION_START)
                out.ids.extend([tokenizer.token_id(IMAGE_PAD)] * config.tokens(patches[1]))
                control(VISION_END)
                out.images.append(patches)
                out.keys.append(media.sha256)
                out.text += VISION_START + IMAGE_PAD + VISION_END
            case PrefixEnd():
                flush()
                out.prefix_length = len(out.ids)
    flush()
    return Prompt(
        ids=np.array(out.ids, np.int32),
        images=tuple(out.images),
        image_keys=tuple(out.keys),
        text=out.text,
        prefix_length=out.prefix_length,
    )


def image_loader(config: ImageConfig, *, max_pixels: int = MAX_IMAGE_PIXELS) -> LoadMedia:
    """Decode and patchify, with no cache."""

    def load(media: Media, path: str) -> Patches:
        if media.kind is not MediaKind.IMAGE:
            raise UnsupportedError(
                f"{path or 'the input'}: media of kind {media.kind} is not supported here; "
                "send an image",
                reason="UNSUPPORTED_MEDIA",
            )
        field = f"{path}.image.data" if path else ""
        image = decode_image(media.data, max_pixels=max_pixels, field=field)
        return patchify(image, config, field=field)

    return load
