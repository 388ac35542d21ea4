"""The 78 data sets of MMEB-V2: what each one is, is scored by, and where it is published.

Image tasks bring their instructions in their rows. The instructions of video and page tasks are no
part of their data but of the authors' code; here they are in our own words, and a file
(`--instructions`) replaces them for figures that are to be compared word for word.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tte_jax.errors import InvalidInputError


class Modality(enum.StrEnum):
    IMAGE = "image"
    VIDEO = "video"
    VISDOC = "visdoc"


class Group(enum.StrEnum):
    CLASSIFICATION = "classification"
    QA = "qa"
    RETRIEVAL = "retrieval"
    GROUNDING = "grounding"
    MOMENTS = "moment_retrieval"
    VIDORE_V1 = "vidore_v1"
    VIDORE_V2 = "vidore_v2"
    VISRAG = "visrag"
    OUT_OF_DOMAIN = "out_of_domain"


class Pool(enum.StrEnum):
    """What a query's candidates are: its own list, or every candidate of the task."""

    LOCAL = "local"
    GLOBAL = "global"


class Layout(enum.StrEnum):
    """How the rows of a data set are written; each has one reader."""

    IMAGE_TO_TEXT = "image_to_text"  # an image and perhaps a text; candidates are texts
    TEXT_TO_IMAGE = "text_to_image"  # a text; candidates are images, some with a text
    IMAGE_TO_IMAGE = "image_to_image"  # as above from an image; candidates keyed `path:caption`
    BEIR = "beir"  # queries / corpus / qrels
    VIDEO_CLASSES = "video_classes"  # video_id, pos_text (and neg_text: the options)
    VIDEO_CAPTIONS = "video_captions"  # a caption; candidates are videos
    VIDEO_QA = "video_qa"
    MOMENT_FOLDERS = "moment_folders"  # one folder a video: query, positive*, negative*
    MOMENT_LISTS = "moment_lists"  # rows list the clips


HIT, NDCG = "hit@1", "ndcg_linear@5"
_METRIC = {Modality.IMAGE: HIT, Modality.VIDEO: HIT, Modality.VISDOC: NDCG}
UNKNOWN = "unknown"
IN_ROWS = "in the rows"


@dataclass(frozen=True)
class DatasetInfo:
    """One data set.

    Attributes:
      name: as in the benchmark's tables and in `{name}_score.json`.
      repo, config, split: of its rows on the Hugging Face hub; config "" = the repository's only
        one. Of several configs one is read after the other.
      media: folder of its images or frames in `TIGER-Lab/MMEB-V2`; "" = the media are in the rows.
      query_instruction, target_instruction: our wording; `IN_ROWS` for image tasks.
      ecr_query, ecr_target: which sides the published method gives a reasoning.
      frames: how many frames of a video are looked at; 0 = no video.
      labels: how many classes a global classification pool has; 0 = not one.
      like: the data set whose columns its rows have; "" = its own.
    """

    name: str
    modality: Modality
    group: Group
    pool: Pool
    layout: Layout
    repo: str
    configs: tuple[str, ...] = ()
    split: str = "test"
    media: str = ""
    query_instruction: str = IN_ROWS
    target_instruction: str = IN_ROWS
    ecr_query: bool = False
    ecr_target: bool = False
    frames: int = 0
    labels: int = 0
    language: str = ""
    like: str = ""

    @property
    def columns_of(self) -> str:
        """The data set after which its columns are named."""
        return self.like or self.name

    @property
    def metric(self) -> str:
        return _METRIC[self.modality]


_IMAGE_REPO = "ziyjiang/MMEB_Test_Instruct"


def _image(
    group: Group, layout: Layout, names: str, *, query: bool, target: bool
) -> list[DatasetInfo]:
    return [
        DatasetInfo(
            name,
            Modality.IMAGE,
            group,
            Pool.LOCAL,
            layout,
            _IMAGE_REPO,
            (name,),
            media="image-tasks",
            ecr_query=query,
            ecr_target=target,
        )
        for name in names.split()
    ]


_CLASSES = (
    "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet "
    "Country211"
)
_QUESTIONS = "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA"
_TO_IMAGE = "VisDial VisualNews_t2i MSCOCO_t2i WebQA Wiki-SS-NQ EDIS"
_TO_TEXT = "VisualNews_i2t MSCOCO_i2t"
_ACROSS = "CIRR NIGHTS FashionIQ OVEN"
_GROUNDING = "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"

_SHOWN_PAGE = "Find the document page that answers the query."
_PAGE = "Represent the content of this document page."
_VIDEO = "Represent the content of this video."
_ASKED = "Answer the question about the video with one of the options."


def _video(
    name: str,
    group: Group,
    pool: Pool,
    layout: Layout,
    query: str,
    target: str = "",
    *,
    repo: str = "",
    configs: tuple[str, ...] = (),
    split: str = "test",
    folder: str = "",
    ecr: tuple[bool, bool],
    labels: int = 0,
) -> DatasetInfo:
    kind = {
        Group.CLASSIFICATION: "video_cls",
        Group.QA: "video_qa",
        Group.RETRIEVAL: "video_ret",
        Group.MOMENTS: "video_mret",
    }[group]
    return DatasetInfo(
        name,
        Modality.VIDEO,
        group,
        pool,
        layout,
        repo or f"VLM2Vec/{name}",
        configs,
        split,
        media=f"video-tasks/frames/{kind}/{folder or name}",
        query_instruction=query,
        target_instruction=target,
        ecr_query=ecr[0],
        ecr_target=ecr[1],
        frames=8,
        labels=labels,
    )


def _classes(name: str, labels: int, repo: str = "") -> DatasetInfo:
    query = "Name what is done in the video."
    return _video(
        name,
        Group.CLASSIFICATION,
        Pool.GLOBAL,
        Layout.VIDEO_CLASSES,
        query,
        ecr=(True, False),
        labels=labels,
        repo=repo,
    )


def _captions(name: str, **kwargs: object) -> DatasetInfo:
    return _video(
        name,
        Group.RETRIEVAL,
        Pool.GLOBAL,
        Layout.VIDEO_CAPTIONS,
        "Find the video that the text describes.",
        _VIDEO,
        ecr=(False, True),
        **kwargs,  # pyright: ignore[reportArgumentType]
    )


def _questions(name: str, **kwargs: object) -> DatasetInfo:
    return _video(
        name,
        Group.QA,
        Pool.LOCAL,
        Layout.VIDEO_QA,
        _ASKED,
        ecr=(True, False),
        **kwargs,  # pyright: ignore[reportArgumentType]
    )


def _moments(name: str, layout: Layout, folder: str = "") -> DatasetInfo:
    query = "Find the clip that shows what the text describes."
    return _video(
        name,
        Group.MOMENTS,
        Pool.LOCAL,
        layout,
        query,
        "Represent the content of this clip.",
        folder=folder,
        ecr=(True, True),
    )


MVBENCH = (
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action "
    "unexpected_action object_existence object_interaction object_shuffle moving_direction "
    "action_localization scene_transition action_count moving_count moving_attribute state_change "
    "fine_grained_pose character_order egocentric_navigation counterfactual_inference"
).split()


def _pages(group: Group, name: str, repo: str, split: str = "test") -> DatasetInfo:
    return DatasetInfo(
        name,
        Modality.VISDOC,
        group,
        Pool.GLOBAL,
        Layout.BEIR,
        repo,
        split=split,
        query_instruction=_SHOWN_PAGE,
        target_instruction=_PAGE,
        ecr_target=True,
    )


_VIDORE_V1 = {
    "arxivqa": "arxivqa_test_subsampled_beir",
    "docvqa": "docvqa_test_subsampled_beir",
    "infovqa": "infovqa_test_subsampled_beir",
    "tabfquad": "tabfquad_test_subsampled_beir",
    "tatdqa": "tatdqa_test_beir",
    "shiftproject": "shiftproject_test_beir",
    "syntheticDocQA_artificial_intelligence": "syntheticDocQA_artificial_intelligence_test_beir",
    "syntheticDocQA_energy": "syntheticDocQA_energy_test_beir",
    "syntheticDocQA_government_reports": "syntheticDocQA_government_reports_test_beir",
    "syntheticDocQA_healthcare_industry": "syntheticDocQA_healthcare_industry_test_beir",
}
# The multilingual sets are their repositories' queries in all languages.
_VIDORE_V2 = {
    "esg_reports_human_labeled_v2": "esg_reports_human_labeled_v2",
    "biomedical_lectures_v2_multilingual": "biomedical_lectures_v2",
    "economics_reports_v2_multilingual": "economics_reports_v2",
    "esg_reports_v2_multilingual": "esg_reports_v2",
}
_OUT_OF_DOMAIN = {
    "ViDoSeek-page": "VLM2Vec/ViDoSeek-page-fixed",
    "ViDoSeek-doc": "VLM2Vec/ViDoSeek",
    "MMLongBench-page": "VLM2Vec/MMLongBench-page-fixed",
    "MMLongBench-doc": "VLM2Vec/MMLongBench-doc",
}
_VISRAG = "ArxivQA ChartQA MP-DocVQA SlideVQA InfoVQA PlotQA"

DATASETS: tuple[DatasetInfo, ...] = (
    *_image(Group.CLASSIFICATION, Layout.IMAGE_TO_TEXT, _CLASSES, query=True, target=False),
    *_image(Group.QA, Layout.IMAGE_TO_TEXT, _QUESTIONS, query=True, target=False),
    *_image(Group.RETRIEVAL, Layout.TEXT_TO_IMAGE, _TO_IMAGE, query=True, target=True),
    *_image(Group.RETRIEVAL, Layout.IMAGE_TO_TEXT, _TO_TEXT, query=True, target=False),
    *_image(Group.RETRIEVAL, Layout.IMAGE_TO_IMAGE, _ACROSS, query=True, target=True),
    *_image(Group.GROUNDING, Layout.IMAGE_TO_IMAGE, _GROUNDING, query=True, target=True),
    _classes("K700", 700, repo="VLM2Vec/Kinetics-700"),
    _video(
        "SmthSmthV2",
        Group.CLASSIFICATION,
        Pool.LOCAL,
        Layout.VIDEO_CLASSES,
        "Name what is done in the video.",
        folder="SSv2",
        ecr=(True, False),
    ),
    _classes("HMDB51", 51),
    _classes("UCF101", 101),
    _classes("Breakfast", 10),
    _questions("MVBench", configs=tuple(MVBENCH), split="train"),
    _questions("Video-MME"),
    _questions("NExTQA", configs=("MC",)),
    _questions("EgoSchema", configs=("Subset",)),
    _questions("ActivityNetQA"),
    _captions("DiDeMo"),
    _captions("MSR-VTT", configs=("test_1k",)),
    _captions("MSVD"),
    _captions("VATEX"),
    _captions("YouCook2", repo="lmms-lab/YouCook2", split="val"),
    _moments("QVHighlight", Layout.MOMENT_FOLDERS),
    _moments("Charades-STA", Layout.MOMENT_FOLDERS, "Charades_STA"),
    _moments("MomentSeeker", Layout.MOMENT_LISTS),
    *(_pages(Group.VIDORE_V1, f"ViDoRe_{n}", f"vidore/{r}") for n, r in _VIDORE_V1.items()),
    *(_pages(Group.VIDORE_V2, f"ViDoRe_{n}", f"vidore/{r}") for n, r in _VIDORE_V2.items()),
    *(
        _pages(Group.VISRAG, f"VisRAG_{n}", f"openbmb/VisRAG-Ret-Test-{n}", "train")
        for n in _VISRAG.split()
    ),
    *(_pages(Group.OUT_OF_DOMAIN, n, r) for n, r in _OUT_OF_DOMAIN.items()),
)
BY_NAME: Mapping[str, DatasetInfo] = {d.name: d for d in DATASETS}
# What the same data set is called in result files of others.
ALIASES = {
    "Kinetics-700": "K700",
    "ViDoSeek-page-fixed": "ViDoSeek-page",
    "MMLongBench-page-fixed": "MMLongBench-page",
    **{n: f"ViDoRe_{n}" for n in _VIDORE_V2},
}

# How many last parts of a path name a candidate; elsewhere an id is no path of anyone's machine.
_ID_PARTS = {Layout.MOMENT_FOLDERS: 2, Layout.MOMENT_LISTS: 1}


def candidate_id(task: str, id: str) -> str:
    """The id that a candidate of a data set has here; for moments others write its frames' folder,
    with all that lies above it on their machine."""
    info = BY_NAME.get(task)
    parts = _ID_PARTS.get(info.layout, 0) if info else 0
    return "/".join(id.rstrip("/").split("/")[-parts:]) if parts else id


def select(names: Iterable[str]) -> list[DatasetInfo]:
    """The data sets meant by names, modalities, groups (`image/qa`, or `qa` for both) or `all`.

    In the benchmark's order, each once. Raises InvalidInputError for a word that means none.
    """
    wanted: set[str] = set()
    for word in names:
        found = {d.name for d in DATASETS if _means(word, d)}
        if not found:
            near = [d.name for d in DATASETS if word.lower() in d.name.lower()]
            raise InvalidInputError(
                f"--tasks {word!r} is no data set of MMEB-V2. "
                + (f"Did you mean {', '.join(near[:5])}? " if near else "")
                + "Give names, image, video, visdoc, a group such as image/qa, or all; "
                "`tte eval mmeb-v2 --list` shows them.",
                field="--tasks",
                reason="UNKNOWN_TASK",
            )
        wanted |= found
    return [d for d in DATASETS if d.name in wanted]


def _means(word: str, info: DatasetInfo) -> bool:
    known = ALIASES.get(word, word)
    groups = (info.modality, info.group, f"{info.modality}/{info.group}", "all")
    return known == info.name or word in groups


def as_json(info: DatasetInfo) -> dict[str, object]:
    """What `tte eval mmeb-v2 --list --json` says of one data set."""
    return {
        "name": info.name,
        "modality": str(info.modality),
        "group": str(info.group),
        "pool": str(info.pool),
        "metric": info.metric,
        "rows": {"repo": info.repo, "configs": list(info.configs), "split": info.split},
        "media": info.media or "in the rows",
        "layout": str(info.layout),
        "query_instruction": info.query_instruction or UNKNOWN,
        "target_instruction": info.target_instruction or "none",
        "ecr_query": info.ecr_query,
        "ecr_target": info.ecr_target,
        "frames": info.frames,
    }
