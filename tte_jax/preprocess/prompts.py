"""The prompts of a model: which wording it was made for, and every sequence built from it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tte_jax.content import NO_REASONING, Content, Media, Reasoning, Side, Task
from tte_jax.errors import (
    InvalidInputError,
    NotFoundError,
    PreconditionError,
    UnsupportedError,
)
from tte_jax.models.files import read_json
from tte_jax.preprocess import prompts_full, prompts_list, prompts_mini
from tte_jax.preprocess.ecr import END_THINK, THINK, cut_words, parse_ecr, plain
from tte_jax.preprocess.media import LoadMedia, media_loader
from tte_jax.preprocess.patches import ImageConfig
from tte_jax.preprocess.prompts_published import PUBLISHED
from tte_jax.preprocess.template import (
    IM_END,
    Ids,
    MediaSlot,
    Piece,
    Prompt,
    Tagged,
    Turn,
    assemble,
)
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.preprocess.video_config import VideoConfig
from tte_jax.stages import EmbedItem, ReasonItem

__all__ = ["EmbedMode", "Prompt", "PromptSet", "choose_task", "prompts_name"]


class EmbedMode(enum.StrEnum):
    """Which part of an ECR the embedder reads."""

    WHOLE = "whole"
    THINK = "think"
    ANSWER = "answer"
    NONE = "none"


class Wording(Protocol):
    """What a module of wordings has: `prompts_full`, `prompts_mini` and the published formats."""

    @property
    def reason(self) -> Callable[[Turn], list[Piece]]: ...

    @property
    def embed(self) -> Callable[[Turn, str], list[Piece]]: ...

    @property
    def rerank_prefix(self) -> Callable[..., list[Piece]]: ...

    @property
    def rerank_suffix(self) -> Callable[..., list[Piece]]: ...


_WORDINGS: dict[str, Wording] = {"full": prompts_full, "mini": prompts_mini, **PUBLISHED}
_MROPE_MODES = ("legacy", "current")


def prompts_name(path: str | Path) -> str:
    """Which prompts a model directory was made for.

    `prompts` of its `tte.json`; else the published format whose name the directory bears (such as
    `models/Qwen3-Reranker-0.6B`, see `docs/real_weights.md`); else "full".

    Raises:
      NotFoundError: there is no such directory.
      PreconditionError: `tte.json` is not readable or names prompts that do not exist.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotFoundError(
            f"model directory {path} does not exist; give a directory with config.json and weights",
            reason="MODEL_NOT_FOUND",
        )
    file = path / "tte.json"
    name = read_spec(file).get("prompts")
    if name is None:
        bears = path.resolve().name.lower()
        found = (f.NAME for f in PUBLISHED.values() if f.folder and f.folder in bears)
        return next(found, "full")
    if name not in _WORDINGS:
        raise PreconditionError(
            f"{file} asks for prompts {name!r}; there are {', '.join(sorted(_WORDINGS))}",
            reason="BAD_MODEL_FILE",
        )
    return name


def read_spec(file: Path) -> dict[str, Any]:
    """The object in a `tte.json`, empty where there is no file.

    Raises PreconditionError when it is not a JSON object.
    """
    if not file.is_file():
        return {}
    return read_json(file)


def choose_task(content: Content, side: Side) -> Task:
    """The task of a content when the caller forces none: text alone, media alone, or a change.

    Text beside media is a change on the query side, and part of the item on the document side.
    """
    if not content.media:
        return Task.TEXT
    return Task.COMPOSED if content.text and side is Side.QUERY else Task.IMAGE


class PromptSet:
    """Builds what a model reads. Holds no state but the tokenizer; safe to use from threads.

    Attributes:
      name: "full", "mini" or one of `PUBLISHED`.
      tokenizer: the model's.
      image_config: how images become patches, `None` for a text model.
      video_config: how videos do; None = the model reads none.
      load: media → patches; replace it to put a cache in between.
      plain_positions: see `Prompt`; `mrope_mode` of `tte.json` decides, else the format.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        image_config: ImageConfig | None = None,
        load: LoadMedia | None = None,
        *,
        video_config: VideoConfig | None = None,
        plain_positions: bool | None = None,
    ) -> None:
        published = PUBLISHED.get(name)
        if published is not None and image_config is not None:
            image_config = replace(image_config, **dict(published.image))
        self.name = name
        self.tokenizer = tokenizer
        self.image_config = image_config
        self.video_config = video_config
        self.load = load or (media_loader(image_config, video_config) if image_config else None)
        self._published = published
        self.frame_times = video_config is not None and video_config.whole_video
        self.plain_positions = (
            plain_positions
            if plain_positions is not None
            else published is not None and published.plain_positions
        )
        self._wording = _WORDINGS[name]

    @classmethod
    def from_dir(cls, path: str | Path, *, load: LoadMedia | None = None) -> PromptSet:
        """Read `tte.json`, the tokenizer and, where there is one, the image processor's file.

        Raises:
          NotFoundError: the directory or its tokenizer does not exist.
          PreconditionError, UnsupportedError: a file of it cannot be used.
        """
        name = prompts_name(path)
        files = ("preprocessor_config.json", "processor_config.json")
        has_images = any((Path(path) / file).is_file() for file in files)
        config = ImageConfig.from_dir(path) if has_images else None
        spec = read_spec(Path(path) / "tte.json")
        mode = spec.get("mrope_mode")
        if mode not in (None, *_MROPE_MODES):
            raise PreconditionError(
                f"{path}/tte.json asks for mrope_mode {mode!r}; there are legacy and current",
                reason="BAD_MODEL_FILE",
            )
        video = VideoConfig.from_dir(path) if has_images else None
        if video is not None and name in PUBLISHED:
            own = spec.get("video") or {}
            video = replace(video, **{k: v for k, v in PUBLISHED[name].video if k not in own})
        return cls(
            name,
            Tokenizer.from_dir(path),
            config,
            load,
            video_config=video,
            plain_positions=None if mode is None else mode == "legacy",
        )

    def reason(self, item: ReasonItem, *, field: str = "content") -> Prompt:
        """The reasoner's prompt; generation goes on from its end.

        Raises:
          InvalidInputError: the content is empty or does not suit the forced task.
          UnsupportedError: media for a text model.
        """
        return self._assemble(self._wording.reason(self._reason_turn(item, field)))

    def _reason_turn(self, item: ReasonItem, field: str) -> Turn:
        task = item.task or choose_task(item.content, item.side)
        _require(item.content, field)
        seen = wanted = NO_REASONING
        if task is Task.COMPOSED and not (item.content.media and item.content.text):
            raise InvalidInputError(
                "a composed input needs an image and the change to it as text", field=field
            )
        if task is Task.TEXT and item.content.media:
            raise InvalidInputError(
                "task TEXT was forced, but the content has media; leave the task open", field=field
            )
        if task is Task.IMAGE and not item.content.media:
            raise InvalidInputError("task IMAGE was forced, but there is no image", field=field)
        if task is Task.REWRITE:
            seen = _described(item.candidate_reasoning, item.content)
            wanted = _described(item.query_reasoning, item.query)
            if not (wanted.think or wanted.answer):
                raise InvalidInputError(
                    "a rewrite needs the query: its text or its reasoning",
                    field="query",
                    reason="EMPTY_QUERY",
                )
        return Turn(
            task=task,
            side=item.side,
            media=_slots(item.content, field),
            text=item.content.text,
            instruction=item.instruction.strip(),
            seen=seen,
            wanted=wanted,
        )

    def embed(
        self, item: EmbedItem, *, mode: EmbedMode = EmbedMode.WHOLE, field: str = "content"
    ) -> Prompt:
        """The embedder's sequence, ECR included; its last token is pooled.

        Raises:
          InvalidInputError: the content is empty.
          UnsupportedError: media for a text model.
        """
        return self._assemble(self._embed_pieces(item, mode, field))

    def _embed_pieces(self, item: EmbedItem, mode: EmbedMode, field: str) -> list[Piece]:
        _require(item.content, field)
        turn = Turn(
            task=choose_task(item.content, item.side),
            side=item.side,
            media=_slots(item.content, field),
            text=item.content.text,
            instruction=item.instruction.strip(),
        )
        pieces = self._wording.embed(turn, _ecr_part(item.reasoning, mode))
        if self._published is not None:  # their code lets the tokenizer close the text
            pieces = [*pieces, Ids(self.tokenizer.closing_ids)]
        return pieces

    @cached_property
    def unified(self) -> bool:
        """Whether the embedder reads on where the reasoner stopped: the same turn, then the ECR."""
        probe = ReasonItem(Content.of("probe"), Side.QUERY)
        try:
            return self.embed_ids(probe, self.reason(probe), "") is not None
        except UnsupportedError:  # prompts for one role only
            return False

    def embed_ids(self, item: ReasonItem, asked: Prompt, reasoning: str) -> np.ndarray | None:
        """The ids of `embed` of the same content with this ECR, made without reading its media.

        Args:
          item: what was reasoned about.
          asked: its `reason` prompt.
          reasoning: the ECR's text.

        Returns:
          [T] int32; None when the embedder's sequence does not begin with the reasoner's turn, as
          for a rewrite, a forced task, or prompts that word the two differently.
        """
        content = EmbedItem(item.content, item.side, reasoning, item.instruction)
        start = self._wording.reason(self._reason_turn(item, "content"))
        whole = self._embed_pieces(content, EmbedMode.WHOLE, "content")
        added = whole[len(start) :]
        if whole[: len(start)] != start or any(isinstance(p, MediaSlot) for p in added):
            return None
        # Texts that touch are encoded together, so what follows the last control token is redone.
        texts = 0
        while texts < len(start) and isinstance(start[-1 - texts], str | Tagged):
            texts += 1
        kept = len(asked.ids) - len(self._assemble(start[len(start) - texts :]).ids)
        tail = self._assemble(whole[len(start) - texts :])
        return np.concatenate([asked.ids[:kept], tail.ids])

    @property
    def rerank_media(self) -> bool:
        """Whether the reranker's format has a place for media."""
        return self._published is not None and self._published.rerank_media

    def rerank_prefix(
        self, query: str | Content, instruction: str = "", *, field: str = "query"
    ) -> Prompt:
        """What all candidates of one query share; all of it is a prefix.

        Args:
          query: text, ECR text, or a content where the format has a place for media.

        Raises:
          InvalidInputError: the query is empty.
          UnsupportedError: media for a reranker of texts.
        """
        text, media = self._rerank_item(query, field)
        _require_query(text or media, field)
        more = (media,) if media else ()
        return self._assemble(self._wording.rerank_prefix(text, instruction.strip(), *more))

    def rerank_suffix(self, document: str | Content, *, field: str = "candidate") -> Prompt:
        """One candidate, to follow the prefix; the next token is `yes_id` or `no_id`.

        Raises:
          UnsupportedError: media for a reranker of texts.
        """
        text, media = self._rerank_item(document, field)
        return self._assemble(self._wording.rerank_suffix(text, *((media,) if media else ())))

    def rerank_list(
        self, query: str, documents: Sequence[str], instruction: str = "", *, field: str = "query"
    ) -> Prompt:
        """The listwise reranker's whole prompt; generation goes on from its end.

        Raises:
          InvalidInputError: the query is empty.
        """
        asked = _without_tags(query)
        _require_query(asked, field)
        texts = [_without_tags(document) for document in documents]
        return self._assemble(prompts_list.order(asked, texts, instruction.strip()))

    def _rerank_item(self, item: str | Content, field: str) -> tuple[str, tuple[MediaSlot, ...]]:
        if isinstance(item, str):
            return _without_tags(item), ()
        media = _slots(item, field)
        if media and not self.rerank_media:
            raise UnsupportedError(
                f"{field}: this reranker compares texts; send the content's text or its reasoning, "
                "or serve a Qwen3-VL-Reranker",
                reason="NO_VISION",
            )
        return _without_tags(item.text), media

    @cached_property
    def yes_id(self) -> int:
        return self.tokenizer.token_id("yes")

    @cached_property
    def no_id(self) -> int:
        return self.tokenizer.token_id("no")

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation: end of turn and, where there is one, end of text."""
        ids = [self.tokenizer.token_id(IM_END)]
        if self.tokenizer.has_control("<|endoftext|>"):
            ids.append(self.tokenizer.token_id("<|endoftext|>"))
        return tuple(ids)

    @cached_property
    def end_think_ids(self) -> tuple[int, ...]:
        """What to force when the budget of thinking is spent; the answer follows it."""
        return tuple(self.tokenizer.encode_tagged(f"{END_THINK}\nAnswer:"))

    def _assemble(self, pieces: list[Piece]) -> Prompt:
        return assemble(
            pieces,
            self.tokenizer,
            config=self.image_config,
            load=self.load,
            frame_times=self.frame_times,
            plain_positions=self.plain_positions,
        )


def _require(content: Content, field: str) -> None:
    if content.empty:
        raise InvalidInputError(
            "the content is empty; send text, an image or both", field=field, reason="EMPTY_CONTENT"
        )


def _require_query(given: object, field: str) -> None:
    if not given:
        raise InvalidInputError(
            "the query is empty; send its text or its reasoning", field=field, reason="EMPTY_QUERY"
        )


def _slots(content: Content, field: str) -> tuple[MediaSlot, ...]:
    return tuple(
        MediaSlot(part, f"{field}.parts[{i}]")
        for i, part in enumerate(content.parts)
        if isinstance(part, Media)
    )


def _described(reasoning: str, content: Content | None) -> Reasoning:
    """The ECR, or the content's text standing in for it."""
    parsed = parse_ecr(cut_words(reasoning))
    if parsed.think or parsed.answer:
        return parsed
    text = content.text if content else ""
    return Reasoning(text=text, think=text, answer="")


def _ecr_part(reasoning: str, mode: EmbedMode) -> str:
    if mode is EmbedMode.NONE or not reasoning.strip():
        return ""
    if mode is EmbedMode.WHOLE:
        return cut_words(reasoning).strip()
    parsed = parse_ecr(reasoning)
    return cut_words(parsed.think if mode is EmbedMode.THINK else parsed.answer)


def _without_tags(text: str) -> str:
    """Reranker input: an ECR loses its tags, plain text stays as it is."""
    if THINK in text or END_THINK in text:
        return cut_words(plain(parse_ecr(text)))
    return text.strip()
