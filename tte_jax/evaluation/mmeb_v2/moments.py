"""Moment retrieval: which clip of a video shows what a text (and perhaps an example) asks for."""

from __future__ import annotations

from functools import partial
from pathlib import PurePath

from tte_jax.evaluation.mmeb_v2.files import read_rows
from tte_jax.evaluation.mmeb_v2.frames import frame_paths, video_content
from tte_jax.evaluation.mmeb_v2.reading import Gathered, Source, picture, text_of
from tte_jax.evaluation.mmeb_v2.video import frames_of
from tte_jax.evaluation.task import EvalTask, Query


def read_folders(source: Source) -> EvalTask:
    """QVHighlight and Charades-STA: a video's folder holds its `query` frames and a folder for each
    clip, of which one is called `positive…`. Clips are named `video/folder`."""
    made, media = Gathered(), source.media
    rows = read_rows(source.info, source.root, columns=("query", "video_path"))
    for number, row in enumerate(source.first(rows)):
        video = PurePath(row["video_path"]).stem
        folder = media / video
        shown = frames_of(folder / "query", source, made)
        clips = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        clips = [p for p in clips if p.name != "query"]
        right = [p for p in clips if p.name.startswith("positive")]
        if not right:
            made.lacking[str(folder / "positive")] = None
        for clip in clips:
            paths = frames_of(clip, source, made)
            load = partial(video_content, paths)
            made.add(f"{video}/{clip.name}", load, source.target_instruction)
        made.queries.append(
            Query(
                str(number),
                partial(video_content, shown, row["query"]),
                # The reference keeps one of several; there is one in the published data.
                tuple(f"{video}/{p.name}" for p in right[-1:]),
                pool=tuple(f"{video}/{p.name}" for p in clips),
                instruction=source.query_instruction,
            )
        )
    return made.task(source)


def read_lists(source: Source) -> EvalTask:
    """MomentSeeker: rows list positive and negative clips; the query may come with an image or a
    video. All stored frames of a clip are looked at (there are eight)."""
    made, media = Gathered(), source.media
    columns = ("query", "positive_frames", "negative_frames", "input_frames")
    for number, row in enumerate(
        source.first(read_rows(source.info, source.root, columns=columns))
    ):
        right = [_name(clip["output_path"]) for clip in row["positive_frames"]]
        wrong = [_name(clip["output_path"]) for clip in row["negative_frames"]]
        for name in (*right, *wrong):
            paths = frame_paths(media / "video_frames" / name)
            if not paths:
                made.lacking[str(media / "video_frames" / name)] = None
            made.add(name, partial(video_content, paths), source.target_instruction)
        example = row["input_frames"] or ""
        if example.endswith(".mp4"):
            folder = media / "video_frames" / _name(example)
            paths = frame_paths(folder)
            if not paths:
                made.lacking[str(folder)] = None
            load = partial(video_content, paths, row["query"])
        elif example.endswith(".jpg"):
            load = picture(made.need(media / f"query_{example}"), row["query"])
        else:
            load = text_of(row["query"])
        made.queries.append(
            Query(
                str(number),
                load,
                tuple(dict.fromkeys(right)),
                pool=tuple(dict.fromkeys((*right, *wrong))),
                instruction=source.query_instruction,
            )
        )
    return made.task(source)


def _name(path: str) -> str:
    """ "a/b/clip.mp4" → "a_b_clip", the clip's folder."""
    return path.replace("/", "_").split(".mp4")[0]
