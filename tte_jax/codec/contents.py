"""Contents and reasonings."""

from __future__ import annotations

from tte.v1 import content_pb2
from tte_jax import limits
from tte_jax.content import Content, Media, MediaKind, Part, Reasoning, Text
from tte_jax.errors import InvalidInputError


def encode_content(content: Content) -> content_pb2.Content:
    return content_pb2.Content(parts=[_encode_part(part) for part in content.parts])


def decode_content(message: content_pb2.Content, at: str, *, allow_empty: bool = False) -> Content:
    """The content, its size and emptiness checked; media are not decoded here.

    Args:
      at: path of the field, for errors.
      allow_empty: accepts a content without media and text (a stored one whose media were left
        out).

    Raises:
      InvalidInputError: nothing in it, too many parts, an unset part, empty media, media of more
        bytes than a message holds, long text.
    """
    if len(message.parts) > limits.MAX_PARTS:
        raise InvalidInputError(
            f"{at}.parts has {len(message.parts)} parts: at most {limits.MAX_PARTS} are accepted",
            field=f"{at}.parts",
            limit=limits.MAX_PARTS,
        )
    parts = tuple(_decode_part(p, f"{at}.parts[{i}]") for i, p in enumerate(message.parts))
    content = Content(parts)
    size = sum(len(media.data) for media in content.media)
    if size > limits.MAX_MESSAGE_BYTES:
        raise InvalidInputError(
            f"the media of {at} have {size} bytes: a message holds {limits.MAX_MESSAGE_BYTES}",
            field=f"{at}.parts",
            reason="CONTENT_TOO_LARGE",
            limit=limits.MAX_MESSAGE_BYTES,
        )
    if content.empty and not allow_empty:
        raise InvalidInputError(
            f"{at} is empty: give at least one image, video, page or text that is not blank",
            field=at,
            reason="EMPTY_CONTENT",
        )
    return content


def text_only(content: Content) -> Content:
    """The content without its media."""
    return Content(tuple(part for part in content.parts if isinstance(part, Text)))


def encode_reasoning(reasoning: Reasoning) -> content_pb2.Reasoning:
    return content_pb2.Reasoning(
        text=reasoning.text,
        think=reasoning.think,
        answer=reasoning.answer,
        tokens=reasoning.tokens,
        truncated=reasoning.truncated,
    )


def decode_reasoning(message: content_pb2.Reasoning) -> Reasoning:
    return Reasoning(
        text=message.text,
        think=message.think,
        answer=message.answer,
        tokens=message.tokens,
        truncated=message.truncated,
    )


def check_text(text: str, at: str, limit: int) -> str:
    """The text, or InvalidInputError when it has more than `limit` characters."""
    if len(text) > limit:
        raise InvalidInputError(
            f"{at} has {len(text)} characters: at most {limit} are accepted", field=at, limit=limit
        )
    return text


def check_id(text: str, at: str) -> str:
    """The id, or InvalidInputError when it is empty or too long."""
    if not text:
        raise InvalidInputError(f"{at} is empty: give an id", field=at)
    return check_text(text, at, limits.MAX_ID_CHARS)


def _encode_part(part: Part) -> content_pb2.Part:
    if isinstance(part, Text):
        return content_pb2.Part(text=part.text)
    match part.kind:
        case MediaKind.IMAGE:
            return content_pb2.Part(image=content_pb2.Image(data=part.data))
        case MediaKind.VIDEO:
            return content_pb2.Part(video=content_pb2.Video(data=part.data))
        case MediaKind.PAGE:
            return content_pb2.Part(page=content_pb2.Page(data=part.data, page=part.page))


def _decode_part(message: content_pb2.Part, at: str) -> Part:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidInputError(f"{at} holds nothing: set text, image, video or page", field=at)
    if kind == "text":
        return Text(check_text(message.text, f"{at}.text", limits.MAX_TEXT_CHARS))
    media = getattr(message, kind)
    if not media.data:
        raise InvalidInputError(
            f"{at}.{kind}.data has zero bytes: give the encoded file",
            field=f"{at}.{kind}.data",
            reason="EMPTY_MEDIA",
        )
    if kind == "page" and media.page >= limits.MAX_PAGES:
        raise InvalidInputError(
            f"{at}.page.page is {media.page}: page numbers are below {limits.MAX_PAGES}",
            field=f"{at}.page.page",
            limit=limits.MAX_PAGES,
        )
    return Media(media.data, MediaKind(kind), media.page if kind == "page" else 0)
