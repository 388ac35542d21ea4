"""The tasks of mini-MMEB, each after a data set of the benchmark whose layout it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tte_jax.errors import InvalidInputError
from tte_jax.evaluation.mini import clips, drawings, grounding, motion, pages, questions
from tte_jax.evaluation.mini.concepts import NAMES, OPENMOJI, TWEMOJI
from tte_jax.evaluation.mini.packages import Package, Registry
from tte_jax.evaluation.mini.workshop import Workshop
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME, DatasetInfo, Layout

REPO = "tte/mini-mmeb"
DEFAULT = "installed"
"""The word for the tasks that need no package beyond those installed with this library."""


@dataclass(frozen=True)
class MiniTask:
    """A task and how it is made.

    Attributes:
      info: for the readers, `info.like` names the data set whose layout it has.
      about: query → candidates, for people.
      pool: how many candidates a query has; Q is the number of queries.
      packages: what it is made of.
    """

    info: DatasetInfo
    about: str
    pool: str
    packages: tuple[Package, ...]
    make: Callable[[Workshop], None]

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def downloads(self) -> tuple[Package, ...]:
        """Packages that are fetched when they are first needed."""
        return tuple(p for p in self.packages if p.registry is not Registry.INSTALLED)


def _task(
    name: str,
    like: str,
    make: Callable[[Workshop], None],
    about: str,
    pool: str,
    *packages: Package,
    media: str = "",
    labels: int = 0,
) -> MiniTask:
    """`media`: the last part of its frames' folder; `labels`: as in `DatasetInfo`."""
    base = BY_NAME[like]
    if base.layout is Layout.BEIR:
        info = replace(base, name=name, repo=f"tte/{name}", like=like)
    elif not base.frames:
        info = replace(base, name=name, repo=REPO, configs=(name,), like=like)
    else:
        folder = f"{base.media.rpartition('/')[0]}/{media or name}"
        info = replace(base, name=name, repo=f"tte/{name}", media=folder, labels=labels, like=like)
    return MiniTask(info, about, pool, packages or _DRAWN, make)


_DRAWN = (OPENMOJI, NAMES)
_BOTH = (OPENMOJI, TWEMOJI, NAMES)

TASKS: tuple[MiniTask, ...] = (
    _task("mini-classification", "ImageNet-1K", drawings.classification,
          "a Twemoji picture → its name", "Q", *_BOTH),
    _task("mini-qa", "A-OKVQA", questions.about_drawings,
          "four drawings and a question → an answer", "4"),
    _task("mini-easy-vqa", "GQA", questions.about_shapes,
          "a shape and a question → one of all answers", "13", questions.EASY_VQA),
    _task("mini-t2i", "MSCOCO_t2i", drawings.text_to_image,
          "a name → its OpenMoji picture", "Q", *_BOTH),
    _task("mini-i2i", "NIGHTS", drawings.image_to_image,
          "a Twemoji picture → OpenMoji's of the same thing", "Q", *_BOTH),
    _task("mini-composed", "CIRR", drawings.composed,
          "a person and a skin tone → that person in it", "5 Q"),
    _task("mini-grounding", "MSCOCO", grounding.among_drawings,
          "six drawings and the name of one → its part of the picture", "6"),
    _task("mini-maps", "RefCOCO", grounding.on_maps,
          "a map, a region and its capital → its part of the map", "4 to 8", grounding.KGEOGRAPHY),
    _task("mini-motion", "HMDB51", motion.classification,
          "a drawing that moves → how", "10", media="mini-motion", labels=len(motion.MOTIONS)),
    _task("mini-clip-names", "SmthSmthV2", clips.classification,
          "an animation → its name", "Q", clips.FLUENT, NAMES, media="mini-clips"),
    _task("mini-v2t", "SmthSmthV2", motion.video_to_text,
          "a drawing that moves → its caption", "5"),
    _task("mini-video-qa", "NExTQA", motion.questions,
          "five drawings one after the other and a question of order → a name", "5"),
    _task("mini-t2v", "MSVD", motion.text_to_video,
          "a caption → the drawing that moves so", "Q"),
    _task("mini-clips", "MSR-VTT", clips.text_to_video,
          "a name → its animation", "Q", clips.FLUENT, NAMES),
    _task("mini-moments", "QVHighlight", motion.moments,
          "five drawings one after the other and a name → the part that shows it", "5"),
    _task("mini-manual", "ViDoRe_docvqa", pages.manual,
          "a topic's description → its pages in R's manual", "--pages", pages.R_MANUAL),
)  # fmt: skip


def select(words: Iterable[str]) -> list[MiniTask]:
    """The tasks meant by names, modalities, groups (`image/qa`, or `qa` for both), `all` or
    `installed`; in the order of `TASKS`, each once.

    Raises InvalidInputError for a word that means none.
    """
    wanted: set[str] = set()
    for word in words:
        found = {task.name for task in TASKS if _means(word, task)}
        if not found:
            raise InvalidInputError(
                f"--tasks {word!r} is no task of mini-MMEB. Give {DEFAULT}, all, image, video, "
                "visdoc, a group such as image/qa, or names: "
                f"{', '.join(task.name for task in TASKS)}.",
                field="--tasks",
                reason="UNKNOWN_TASK",
            )
        wanted |= found
    return [task for task in TASKS if task.name in wanted]


def _means(word: str, task: MiniTask) -> bool:
    info = task.info
    if word == DEFAULT:
        return not task.downloads
    groups = (info.modality, info.group, f"{info.modality}/{info.group}", "all")
    return word in (info.name, *groups)
