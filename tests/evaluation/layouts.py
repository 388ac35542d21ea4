"""Tiny data folders in the published layouts: all 78 names, three queries each.

Written from the descriptions of the layouts, with nothing of the readers' code. What is right is
known by construction: query i shows colour i, and its right candidate is of colour i.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

COLOURS = ("red", "green", "blue")
IMAGE_CLASS_OR_QA = (
    "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet "
    "Country211 OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA "
    "TextVQA VisualNews_i2t MSCOCO_i2t"
).split()
TEXT_TO_IMAGE = "VisDial VisualNews_t2i MSCOCO_t2i WebQA Wiki-SS-NQ EDIS".split()
IMAGE_TO_IMAGE = (
    "CIRR NIGHTS FashionIQ OVEN MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"
).split()
CAPTIONED_TARGETS = ("WebQA", "EDIS", "RefCOCO-Matching")
PAGES = {
    **{
        f"vidore/{n}_test_subsampled_beir": "test"
        for n in ("arxivqa", "docvqa", "infovqa", "tabfquad")
    },
    "vidore/tatdqa_test_beir": "test",
    "vidore/shiftproject_test_beir": "test",
    **{
        f"vidore/syntheticDocQA_{n}_test_beir": "test"
        for n in ("artificial_intelligence", "energy", "government_reports", "healthcare_industry")
    },
    **{
        f"vidore/{n}_v2": "test"
        for n in (
            "esg_reports_human_labeled",
            "biomedical_lectures",
            "economics_reports",
            "esg_reports",
        )
    },
    **{
        f"openbmb/VisRAG-Ret-Test-{n}": "train"
        for n in ("ArxivQA", "ChartQA", "MP-DocVQA", "SlideVQA", "InfoVQA", "PlotQA")
    },
    "VLM2Vec/ViDoSeek-page-fixed": "test",
    "VLM2Vec/ViDoSeek": "test",
    "VLM2Vec/MMLongBench-page-fixed": "test",
    "VLM2Vec/MMLongBench-doc": "test",
}
MVBENCH_SUBSETS = (
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action "
    "unexpected_action object_existence object_interaction object_shuffle moving_direction "
    "action_localization scene_transition action_count moving_count moving_attribute state_change "
    "fine_grained_pose character_order egocentric_navigation counterfactual_inference"
).split()


def picture(colour: str, format: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, format)
    return out.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def arrow(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As `datasets.save_to_disk` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")


def frames(folder: Path, colour: str, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = picture(colour, "JPEG")
    for i in range(count):
        (folder / f"frame_{i + 1:04d}.jpg").write_bytes(data)


def write_all(root: Path) -> Path:
    write_images(root)
    write_pages(root)
    write_videos(root)
    return root


def write_images(root: Path) -> None:
    media = root / "image-tasks"
    for colour in COLOURS:
        path = media / "shared" / f"{colour}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(colour))
    rows_of = root / "ziyjiang/MMEB_Test_Instruct"
    for name in (*IMAGE_CLASS_OR_QA, *TEXT_TO_IMAGE, *IMAGE_TO_IMAGE):
        rows = []
        for colour in COLOURS:
            # The right one first, as published.
            order = [colour, *(c for c in COLOURS if c != colour)]
            to_text = name in IMAGE_CLASS_OR_QA
            texts = order if to_text else [""] * 3
            if name in CAPTIONED_TARGETS:
                texts = [f'"{c} thing"' for c in order]
            from_text = name in TEXT_TO_IMAGE
            rows.append(
                {
                    "qry_inst": "" if from_text else "<|image_1|>\nSay its colour.",
                    "qry_text": colour if from_text else "",
                    "qry_img_path": "" if from_text else f"shared/{colour}.png",
                    "tgt_inst": "" if to_text else "<|image_1|>\nShow the image.",
                    "tgt_text": texts,
                    "tgt_img_path": [""] * 3 if to_text else [f"shared/{c}.png" for c in order],
                }
            )
        parquet(rows_of / name / "test-00000-of-00001.parquet", rows)


def write_pages(root: Path) -> None:
    for repo, split in PAGES.items():
        numbers = repo.startswith("vidore/")  # their ids are numbers, others' are names
        page = (lambda i: i) if numbers else (lambda i: f"page {i}.png")
        file = f"{split}-00000-of-00001.parquet"
        corpus = [
            {"corpus-id": page(i), "image": {"bytes": picture(c), "path": None}}
            for i, c in enumerate(COLOURS)
        ]
        queries = [
            {"query-id": i if numbers else f"q{i}", "query": c} for i, c in enumerate(COLOURS)
        ]
        judged = [
            {"query-id": q["query-id"], "corpus-id": page(i), "score": 2}
            for i, q in enumerate(queries)
        ]
        # A second page of lower grade, and one that is none.
        first = queries[0]["query-id"]
        judged.append({"query-id": first, "corpus-id": page(1), "score": 1})
        judged.append({"query-id": first, "corpus-id": page(2), "score": 0})
        for kind, rows in (("corpus", corpus), ("queries", queries), ("qrels", judged)):
            parquet(root / repo / kind / file, rows)


def write_videos(root: Path) -> None:
    media = root / "video-tasks" / "frames"

    def rows(name: str, made: list[dict[str, Any]], place: str = "data/test") -> None:
        parquet(root / name / f"{place}-00000-of-00001.parquet", made)

    for name, folder in (
        ("Kinetics-700", "K700"),
        ("HMDB51", "HMDB51"),
        ("UCF101", "UCF101"),
        ("Breakfast", "Breakfast"),
        ("SmthSmthV2", "SSv2"),
    ):
        made = []
        for i, colour in enumerate(COLOURS):
            frames(media / "video_cls" / folder / f"v{i}", colour, 70)
            row: dict[str, Any] = {"video_id": f"v{i}", "pos_text": colour}
            made.append(row | ({"neg_text": list(COLOURS)} if name == "SmthSmthV2" else {}))
        rows(f"VLM2Vec/{name}", made)

    captions = {
        "VLM2Vec/DiDeMo": lambda i, c: {"video": f"some/v{i}.mp4", "caption": c},
        "VLM2Vec/MSR-VTT": lambda i, c: {"video_id": f"v{i}", "video": f"v{i}.mp4", "caption": c},
        "VLM2Vec/MSVD": lambda i, c: {"video_id": f"v{i}", "video": "x", "caption": [c, "other"]},
        "VLM2Vec/VATEX": lambda i, c: {"videoID": f"v{i}", "enCap": [c, "other"]},
        "lmms-lab/YouCook2": lambda i, c: {"id": f"v{i}", "video_path": "x", "sentence": c},
    }
    for repo, make in captions.items():
        name = repo.split("/")[1]
        for i, colour in enumerate(COLOURS):
            frames(media / "video_ret" / name / f"v{i}", colour)
        made = [make(i, c) for i, c in enumerate(COLOURS)]
        place = {"MSR-VTT": "test_1k/test", "YouCook2": "data/val"}.get(name, "data/test")
        rows(repo, made, place)

    qa = media / "video_qa"
    lettered = [f"{letter}. {c}." for letter, c in zip("ABCD", (*COLOURS, "grey"), strict=True)]
    for i, colour in enumerate(COLOURS):
        frames(qa / "Video-MME" / f"v{i}", colour)
        frames(qa / "NExTQA" / f"{i}", colour)
        frames(qa / "EgoSchema" / f"v{i}", colour)
        frames(qa / "ActivityNetQA" / f"v_v{i}", colour)
    asked = "What colour"
    rows(
        "VLM2Vec/Video-MME",
        [
            {"videoID": f"v{i}", "question": asked, "options": lettered, "answer": "ABC"[i]}
            for i in range(3)
        ],
    )
    five = dict(zip(("a0", "a1", "a2", "a3", "a4"), (*COLOURS, "grey", "pink"), strict=True))
    rows(
        "VLM2Vec/NExTQA",
        [{"video": i, "question": asked, "answer": i, "qid": i, **five} for i in range(3)],
        "MC/test",
    )
    rows(
        "VLM2Vec/EgoSchema",
        [
            {"video_idx": f"v{i}", "question": asked, "option": lettered, "answer": str(i)}
            for i in range(3)
        ],
        "Subset/test",
    )
    rows(
        "VLM2Vec/ActivityNetQA",
        [
            {"video_name": f"v{i}", "question": f"is it {COLOURS[0]}", "answer": answer}
            for i, answer in enumerate(("yes", "no", "no"))
        ],
    )
    header: list[dict[str, str]] = []
    for number, subset in enumerate(MVBENCH_SUBSETS):
        colour = COLOURS[number % 3]
        frames(qa / "MVBench" / subset / "clip.mp4", colour)
        row = {
            "video": "clip.mp4",
            "question": asked,
            "candidates": list(COLOURS),
            "answer": colour,
        }
        path = root / "VLM2Vec/MVBench/json" / f"{subset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row]))
        header.append({"config_name": subset, "data_files": f"json/{subset}.json"})
    readme = f"---\nlicense: mit\n{yaml.safe_dump({'configs': header})}---\n# MVBench\n"
    (root / "VLM2Vec/MVBench/README.md").write_text(readme)

    mret = media / "video_mret"
    for repo, folder in (("QVHighlight", "QVHighlight"), ("Charades-STA", "Charades_STA")):
        for i, colour in enumerate(COLOURS):
            frames(mret / folder / f"v{i}" / "query", colour, 5)
            frames(mret / folder / f"v{i}" / "positive_0", colour, 8)
            for n, other in enumerate(c for c in COLOURS if c != colour):
                frames(mret / folder / f"v{i}" / f"negative_{n}", other, 8)
        arrow(
            root / "VLM2Vec" / repo / "test",
            [{"query": c, "video_path": f"a/v{i}.mp4"} for i, c in enumerate(COLOURS)],
        )
    seeker = mret / "MomentSeeker"
    for colour in COLOURS:
        frames(seeker / "video_frames" / f"movie_{colour}", colour, 8)
    (seeker / "query_example.jpg").write_bytes(picture("green", "JPEG"))
    given = ("", "example.jpg", "movie/blue.mp4")
    rows(
        "VLM2Vec/MomentSeeker",
        [
            {
                "query": colour,
                "positive_frames": [{"output_path": f"movie/{colour}.mp4"}],
                "negative_frames": [
                    {"output_path": f"movie/{c}.mp4"} for c in COLOURS if c != colour
                ],
                "input_frames": given[i],
            }
            for i, colour in enumerate(COLOURS)
        ],
    )
