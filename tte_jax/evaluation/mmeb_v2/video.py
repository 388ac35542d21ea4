"""Video classification, captions and questions: rows name a video, its frames lie in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from tte_jax.errors import DataLossError
from tte_jax.evaluation.mmeb_v2.files import configs, read_rows
from tte_jax.evaluation.mmeb_v2.frames import frame_paths, video_content
from tte_jax.evaluation.mmeb_v2.reading import Gathered, Source, text_of
from tte_jax.evaluation.task import EvalTask, Query


def frames_of(folder: Path, source: Source, made: Gathered) -> list[Path]:
    """The frames that are looked at; notes a folder with none."""
    found = frame_paths(folder, source.frames)
    if not found:
        made.lacking[str(folder)] = None
    return found


# --- classification ---


def read_classes(source: Source) -> EvalTask:
    """A video and its class. With a column of options (SmthSmthV2) these are the candidates; else
    all classes are, which are those that occur, since the rows do not list them."""
    made, info = Gathered(), source.info
    local = info.labels == 0
    columns = ("video_id", "pos_text") + (("neg_text",) if local else ())
    rows = list(read_rows(info, source.root, columns=columns))
    if not local:
        for row in rows:
            made.add(row["pos_text"], text_of(row["pos_text"]))
        if len(made.items) != info.labels:
            made.notes.append(
                f"the pool has the {len(made.items)} classes that occur in the rows, of "
                f"{info.labels} in all"
            )
    media = source.media
    for number, row in enumerate(source.first(rows)):
        pool = None
        if local:
            pool = tuple(dict.fromkeys(row["neg_text"]))
            for text in pool:
                made.add(text, text_of(text))
        paths = frames_of(media / str(row["video_id"]), source, made)
        made.queries.append(
            Query(
                str(number),
                partial(video_content, paths),
                (row["pos_text"],),
                pool=pool,
                instruction=source.query_instruction,
            )
        )
    return made.task(source)


# --- captions ---

# Columns of the video and of its caption (the first of several), by data set.
_CAPTIONS = {
    "DiDeMo": ("video", "caption"),
    "MSR-VTT": ("video_id", "caption"),
    "MSVD": ("video_id", "caption"),
    "VATEX": ("videoID", "enCap"),
    "YouCook2": ("id", "sentence"),
}


def read_captions(source: Source) -> EvalTask:
    """A caption finds its video among all."""
    made, info = Gathered(), source.info
    video, caption = _CAPTIONS[info.columns_of]
    media = source.media
    (config,) = configs(info)
    rows = read_rows(info, source.root, config=config, columns=(video, caption))
    # Every row's video is a candidate, also behind the limit of queries.
    for number, row in enumerate(rows):
        # DiDeMo gives a path; its folder is called by the file's name.
        name = PurePath(str(row[video])).stem if info.columns_of == "DiDeMo" else str(row[video])
        paths = frames_of(media / name, source, made)
        made.add(name, partial(video_content, paths), source.target_instruction)
        if not source.limit or number < source.limit:
            said = row[caption]
            text = said if isinstance(said, str) else said[0]
            made.queries.append(
                Query(str(number), text_of(text), (name,), instruction=source.query_instruction)
            )
    return made.task(source)


# --- questions ---


@dataclass(frozen=True)
class _Asked:
    """A question in the benchmark's form: what is shown, the options, and the right one.

    Attributes:
      names: of the candidates, in the order of the options.
      texts: what the candidates say.
    """

    folder: str
    text: str
    names: Sequence[str]
    texts: Sequence[str]
    right: int


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]


def _listed(question: str, options: Sequence[str]) -> str:
    return "\n".join([question, "Options:", *_lettered(options)])


def _bare(option: str) -> str:
    """ "A. a dog." → "a dog": the option without its letter."""
    start = option.find(". ")
    return (option[start:] if start >= 0 else option).strip(". ")


def _mvbench(row: dict[str, Any], config: str) -> _Asked:
    names = _lettered(row["candidates"])
    return _Asked(
        f"{config}/{row['video']}",
        _listed(row["question"], row["candidates"]),
        names,
        names,
        row["candidates"].index(row["answer"]),
    )


def _video_mme(row: dict[str, Any], _: str) -> _Asked:
    options = row["options"]
    return _Asked(
        str(row["videoID"]),
        "\n".join([row["question"], *options]),
        options,
        [_bare(option) for option in options],
        "ABCD".index(row["answer"]),
    )


def _nextqa(row: dict[str, Any], _: str) -> _Asked:
    options = [row[f"a{i}"] for i in range(5)]
    text = _listed(row["question"], options)
    return _Asked(str(row["video"]), text, options, options, int(row["answer"]))


def _egoschema(row: dict[str, Any], _: str) -> _Asked:
    options = row["option"]
    return _Asked(
        str(row["video_idx"]),
        row["question"] + " ".join(options),
        options,
        [_bare(option) for option in options],
        int(row["answer"]),
    )


def _activitynet(row: dict[str, Any], _: str) -> _Asked:
    options = ["yes", "no"]
    text = row["question"] + "? (A) yes; (B) no."
    right = options.index(row["answer"])
    return _Asked(f"v_{row['video_name']}", text, options, options, right)


_QUESTIONS: dict[str, tuple[Callable[[dict[str, Any], str], _Asked], tuple[str, ...]]] = {
    "MVBench": (_mvbench, ("video", "question", "candidates", "answer")),
    "Video-MME": (_video_mme, ("videoID", "question", "options", "answer")),
    "NExTQA": (_nextqa, ("video", "question", "answer", "a0", "a1", "a2", "a3", "a4")),
    "EgoSchema": (_egoschema, ("video_idx", "question", "option", "answer")),
    "ActivityNetQA": (_activitynet, ("video_name", "question", "answer")),
}


def read_questions(source: Source) -> EvalTask:
    """A video and a question with its options, which are the candidates."""
    made, info, media = Gathered(), source.info, source.media
    ask, columns = _QUESTIONS[info.columns_of]
    every = (
        (config, row)
        for config in configs(info)
        for row in read_rows(info, source.root, config=config, columns=columns)
    )
    for number, (config, row) in enumerate(every):
        if source.limit and number >= source.limit:
            break
        try:
            asked = ask(row, config)
            right = asked.names[asked.right]
        except (ValueError, IndexError) as error:
            raise DataLossError(
                f"{info.name}: the answer {row['answer']!r} of question {number} is none of its "
                "options. Download the rows again.",
                reason="UNREADABLE_DATA",
            ) from error
        for name, text in zip(asked.names, asked.texts, strict=True):
            made.add(name, text_of(text))
        paths = frames_of(media / asked.folder, source, made)
        made.queries.append(
            Query(
                str(number),
                partial(video_content, paths, asked.text),
                (right,),
                pool=tuple(dict.fromkeys(asked.names)),
                instruction=source.query_instruction,
            )
        )
    return made.task(source)
