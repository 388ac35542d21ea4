"""The prompts that published embedders and rerankers were trained on, to the letter.

The strings of the formats are their authors': a model answers well only to the words it has seen.
An ECR, which none of these models but the reasoning ones know, follows the text on a line of its
own. Each embeds by its last token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tte_jax.content import MediaKind, Side
from tte_jax.errors import UnsupportedError
from tte_jax.preprocess import prompts_full
from tte_jax.preprocess.template import (
    IM_END,
    IM_START,
    MediaSlot,
    Piece,
    PrefixEnd,
    Special,
    Tagged,
    Turn,
)

END_OF_TEXT = "<|endoftext|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
QWEN3_VL_EMBED = "Represent the user's input."
QWEN3_VL_RERANK = "Given a search query, retrieve relevant candidates that answer the query."
QWEN3_RERANK = "Given a web search query, retrieve relevant passages that answer the query"


def _no_reasoning(turn: Turn) -> list[Piece]:
    raise UnsupportedError(
        "this model's prompts are an embedder's or a reranker's; it cannot reason",
        reason="NO_REASONER",
    )


def _no_embedding(turn: Turn, ecr: str) -> list[Piece]:
    raise UnsupportedError(
        "this model's prompts are a reranker's; it cannot embed", reason="NO_EMBEDDER"
    )


def _no_prefix(query: str, instruction: str) -> list[Piece]:
    raise UnsupportedError(
        "this model's prompts are an embedder's; it cannot rerank", reason="NO_RERANKER"
    )


def _no_suffix(document: str) -> list[Piece]:
    return _no_prefix(document, "")


@dataclass(frozen=True)
class Published:
    """A format: the four wordings and what goes with them.

    Attributes:
      folder: what the lower-case name of a directory holds when it is this model.
      plain_positions: text positions for pads that do not follow vision start (transformers up to
        4.52, with which VLM2Vec was trained).
      rerank_media: the reranker's wordings take media as their last argument.
      image, video: limits that the authors' code sets whatever the processor's file says.
    """

    NAME: str
    folder: str
    reason: Callable[[Turn], list[Piece]] = _no_reasoning
    embed: Callable[[Turn, str], list[Piece]] = _no_embedding
    rerank_prefix: Callable[..., list[Piece]] = _no_prefix
    rerank_suffix: Callable[..., list[Piece]] = _no_suffix
    rerank_media: bool = False
    plain_positions: bool = False
    image: tuple[tuple[str, Any], ...] = ()
    video: tuple[tuple[str, Any], ...] = ()


def _vlm2vec(turn: Turn, ecr: str) -> list[Piece]:
    """Pads, a space, instruction, a space, text: no chat template and no vision start."""
    kinds = {slot.media.kind for slot in turn.media}
    default = ""
    if kinds and not turn.text:
        what = "video" if kinds == {MediaKind.VIDEO} else "image"
        default = f"Represent the given {what}."
    words = " ".join(filter(None, (turn.instruction or default, turn.text)))
    slots: list[Piece] = [replace(slot, bare=True) for slot in turn.media]
    return [*slots, f" {words}" if slots else words, *_after(ecr)]


def _chat(turn: Turn, ecr: str) -> list[Piece]:
    """The model's own chat template with the ECR as the reply; the end of it is pooled."""
    words = "\n".join(filter(None, (turn.instruction, turn.text)))
    head = _turns(DEFAULT_SYSTEM, [*turn.media, words])
    return [*head, Tagged(ecr), Special(IM_END)]


def _gme(turn: Turn, ecr: str) -> list[Piece]:
    """Instruction in the system turn (queries only); ends in the end of text, which is pooled."""
    asked = turn.instruction if turn.side is Side.QUERY else ""
    user = [*turn.media, turn.text, *_after(ecr)]
    return [*_turns(asked or DEFAULT_SYSTEM, user), Special(END_OF_TEXT)]


def _qwen3_vl_embed(turn: Turn, ecr: str) -> list[Piece]:
    """Instruction in the system turn, ending in punctuation; videos before images before text."""
    asked = turn.instruction
    if asked and not unicodedata.category(asked[-1]).startswith("P"):
        asked += "."
    user = [*_videos_first(turn.media), turn.text, *_after(ecr)]
    return _turns(asked or QWEN3_VL_EMBED, user)


def _qwen3_vl_rerank_prefix(
    query: str, instruction: str, media: Sequence[MediaSlot] = ()
) -> list[Piece]:
    # The colon belongs to the suffix: a document that begins with punctuation makes one token
    # with it.
    asked = instruction or QWEN3_VL_RERANK
    return [
        Special(IM_START),
        f"system\n{prompts_full.RERANK_SYSTEM}",
        Special(IM_END),
        "\n",
        Special(IM_START),
        f"user\n<Instruct>: {asked}<Query>:",
        *_videos_first(media),
        f"{query}\n<Document",
        PrefixEnd(),
    ]


def _qwen3_vl_rerank_suffix(document: str, media: Sequence[MediaSlot] = ()) -> list[Piece]:
    words = document or ("" if media else "NULL")
    item = [">:", *_videos_first(media), words]
    return [*item, Special(IM_END), "\n", Special(IM_START), "assistant\n"]


def _qwen3_rerank_prefix(query: str, instruction: str) -> list[Piece]:
    return prompts_full.rerank_prefix(query, instruction or QWEN3_RERANK)


def _videos_first(media: Sequence[MediaSlot]) -> list[MediaSlot]:
    """Videos before images, each in the caller's order, as Qwen3-VL's authors put them."""
    return sorted(media, key=lambda slot: slot.media.kind is not MediaKind.VIDEO)


def _turns(system: str, user: list[Piece]) -> list[Piece]:
    """A system and a user turn, and the head of the reply."""
    return [
        Special(IM_START),
        f"system\n{system}",
        Special(IM_END),
        "\n",
        Special(IM_START),
        "user\n",
        *user,
        Special(IM_END),
        "\n",
        Special(IM_START),
        "assistant\n",
    ]


def _after(ecr: str) -> list[Piece]:
    return ["\n", Tagged(ecr)] if ecr else []


_BLOCK = 32 * 32  # pixels of one merged patch of Qwen3-VL
_QWEN3_VL_IMAGE = (("min_pixels", 4 * _BLOCK), ("max_pixels", 1800 * _BLOCK))
_QWEN3_VL_VIDEO = (("fps", 1.0), ("max_frames", 64))

PUBLISHED = {
    format_.NAME: format_
    for format_ in (
        Published("vlm2vec", "vlm2vec", embed=_vlm2vec, plain_positions=True),
        Published("chat", "", embed=_chat),
        Published(
            "gme",
            "gme-qwen2",
            embed=_gme,
            image=(("min_pixels", 256 * 28 * 28), ("max_pixels", 1280 * 28 * 28)),
        ),
        Published(
            "qwen3_vl_embedding",
            "qwen3-vl-embedding",
            embed=_qwen3_vl_embed,
            image=_QWEN3_VL_IMAGE,
            video=_QWEN3_VL_VIDEO,
        ),
        Published(
            "qwen3_vl_reranker",
            "qwen3-vl-reranker",
            rerank_prefix=_qwen3_vl_rerank_prefix,
            rerank_suffix=_qwen3_vl_rerank_suffix,
            rerank_media=True,
            image=_QWEN3_VL_IMAGE,
            video=_QWEN3_VL_VIDEO,
        ),
        Published(
            "qwen3_reranker",
            "qwen3-reranker",
            rerank_prefix=_qwen3_rerank_prefix,
            rerank_suffix=prompts_full.rerank_suffix,
        ),
    )
}
