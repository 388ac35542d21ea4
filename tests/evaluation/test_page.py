"""The HTML report: self-contained, escaped, and with what it promises in it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.evaluation.test_report import write
from training.builtin.evaluate import png
from tte_jax.errors import DataLossError
from tte_jax.evaluation import page, plots
from tte_jax.evaluation.report import find_runs

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def picture(value: int) -> str:
    data = png(np.full((2, 2, 3), value, np.uint8))
    return "data:image/png;base64," + base64.b64encode(data).decode()


def failure(**given: Any) -> dict[str, Any]:
    result = {"id": f"7'\"{EVIL}", "cosine": 0.25, "rerank": 0.0, "ecr": f"Answer: {EVIL}"}
    return {
        "query": "1", "text": f"a cat & {EVIL}", "instruction": "", "ecr": "<think>x</think>",
        "image": picture(1), "label": ["right one"], "rank": 7, "first_stage": [],
        "results": [result], "images": {"right one": picture(2), result["id"]: picture(3)},
    } | given  # fmt: skip


def run(folder: Path, score: float, *, tokens: float | None = None, rows: Any = ()) -> None:
    """SUN397 and MSVD of one arm."""
    write(folder, {"SUN397": score, "MSVD": score / 2})
    for place in (folder / "image/SUN397", folder / "video/MSVD"):
        about: dict[str, Any] = {"arm": {"name": EVIL}, "settings": {"models": EVIL}}
        if tokens is not None:
            about["interval"] = {"low": score / 2, "high": score}
            about |= {"tokens_per_query": tokens, "seconds_per_query": {"mean": tokens / 100}}
        place.with_name(place.name + "_info.json").write_text(json.dumps(about))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "image/SUN397_failures.jsonl").write_text(lines)


class Seen(HTMLParser):
    """Tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def images(self, kind: str) -> list[dict[str, str | None]]:
        start = f"data:image/{kind};base64,"
        return [a for tag, a in self.tags if tag == "img" and (a["src"] or "").startswith(start)]


def made(tmp_path: Path) -> tuple[str, Seen]:
    path = tmp_path / "out/page.html"
    page.write(path, find_runs([tmp_path / "runs"]))
    text = path.read_text("utf-8")
    return text, Seen(text)


def svgs(seen: Seen) -> list[str]:
    return [base64.b64decode((a["src"] or "").partition(",")[2]).decode() for a in
            seen.images(r"svg+xml")]  # fmt: skip


def test_nothing_of_the_data_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    run(tmp_path / "runs/a", 0.5, tokens=3, rows=[failure()])
    text, seen = made(tmp_path)
    assert EVIL not in text and any(EVIL in part for part in seen.texts)
    assert not {tag for tag, _ in seen.tags} & {"script", "iframe", "object", "link", "svg"}
    for _, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    policy = next(a for tag, a in seen.tags if "http-equiv" in a)
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert "url(" not in text and "@import" not in text


@pytest.mark.parametrize(
    "image",
    [
        "https://example.org/x.png",
        "data:image/svg+xml;base64,AAAA",
        "data:image/png;base64,AA' onerror='alert(1)",
        "data:text/html,<script>",
        "",
    ],
)
def test_only_pictures_that_are_in_the_file_are_shown(image: str, tmp_path: Path) -> None:
    run(tmp_path / "runs/a", 0.5, rows=[failure(image=image)])
    text, seen = made(tmp_path)
    # Of the right one and of the result.
    assert len(seen.images("png")) == 2
    assert not image or image not in text


def test_a_wrong_answer_is_shown_with_what_led_to_it(tmp_path: Path) -> None:
    rows = [failure(text=f"query {i}", rank=None if i else 7) for i in range(page.FAILURES + 2)]
    run(tmp_path / "runs/a", 0.5, rows=rows)
    text, seen = made(tmp_path)
    shown = "".join(seen.texts)
    assert "query 0" in shown and f"query {page.FAILURES - 1}" in shown
    assert f"query {page.FAILURES}" not in shown
    assert "right, at rank 7" in shown and "right, not ranked" in shown
    # P(yes) of nought is a score.
    assert "1. cosine 0.250, yes 0.000" in shown and "<think>x</think>" in shown
    assert text.count("class='case'") == page.FAILURES


def test_plots_are_drawn_with_their_axes_named(tmp_path: Path) -> None:
    for name, score, tokens in (("none", 0.4, 0), ("full64", 0.6, 20)):
        run(tmp_path / "runs" / name, score, tokens=tokens)
    text, seen = made(tmp_path)
    titles = [a["alt"] for a in seen.images(r"svg+xml")]
    assert titles == [
        "Quality against tokens",
        "Quality against latency",
        "Scores of the image tasks",
        "Scores of the video tasks",
    ]
    # Letters are drawn as paths; the library leaves each text behind as a comment.
    tokens_plot, latency, images, videos = svgs(seen)
    for svg in (tokens_plot, latency, images, videos):
        ElementTree.fromstring(svg)
        assert "<!-- none -->" in svg and "<!-- full64 -->" in svg
    assert "<!-- generated tokens per query -->" in tokens_plot
    assert "<!-- seconds per query -->" in latency and "<!-- mean score, % -->" in latency
    assert "<!-- SUN397 -->" in images and "<!-- MSVD -->" in videos
    # Names without the folder that both lie in; means over what both have.
    assert "<td>none</td>" in text and "runs/none" not in text
    assert "mean of 2 tasks" in text and "<td>45.00</td>" in text and "<td>0.200</td>" in text


def test_means_are_not_made_of_parts_and_costs_not_made_up(tmp_path: Path) -> None:
    run(tmp_path / "runs/ours", 0.4, tokens=5)
    write(tmp_path / "runs/theirs", {"SUN397": 0.8})
    text, seen = made(tmp_path)
    assert "– <small>2 of 78</small>" in text and "– <small>1 of 36</small>" in text
    assert "mean of 1 task<" in text and "<td>80.00</td><td>–</td><td>–</td>" in text
    assert "settings not known" in text
    tokens_plot = svgs(seen)[0]
    assert "<!-- ours -->" in tokens_plot and "<!-- theirs -->" not in tokens_plot


def test_runs_that_share_no_task_are_not_set_against_each_other(tmp_path: Path) -> None:
    write(tmp_path / "runs/a", {"SUN397": 0.4})
    write(tmp_path / "runs/b", {"MSVD": 0.4})
    text, _ = made(tmp_path)
    assert "No task is in all runs" in text and "Quality against" not in text


def test_files_about_a_run_that_hold_something_else_are_survived(tmp_path: Path) -> None:
    run(tmp_path / "runs/a", 0.5, tokens=3)
    wrong = {"interval": 3, "tokens_per_query": "x", "seconds_per_query": [1], "settings": 4}
    (tmp_path / "runs/a/image/SUN397_info.json").write_text(json.dumps(wrong))
    text, _ = made(tmp_path)
    assert "<td>37.50</td><td>–</td><td>–</td>" in text and "Quality against" not in text


def test_scores_that_lack_something_are_marked_and_the_page_says_what(tmp_path: Path) -> None:
    run(tmp_path / "runs/a", 0.5, tokens=3)
    about = {"queries_failed": 2, "candidates_failed": {EVIL: 1}, "degraded": {"rerank: X": 7}}
    (tmp_path / "runs/a/image/SUN397_info.json").write_text(json.dumps(about))
    text, seen = made(tmp_path)
    assert "<td>50.00*" in text and "<td>25.00 <small>" in text
    shown = "".join(seen.texts)
    said = f"queries failed: 2, candidates failed ({EVIL}): 1, degraded (rerank: X): 7."
    assert f"* runs/a, 1 of 2 tasks: {said}" in shown and EVIL not in text


def test_a_failures_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run(tmp_path / "runs/a", 0.5, rows=[failure(), {"text": "x"}])
    with pytest.raises(DataLossError, match=r"SUN397_failures.jsonl, line 2, cannot be read"):
        made(tmp_path)
    (tmp_path / "runs/a/image/SUN397_failures.jsonl").write_text("[1]\n")
    with pytest.raises(DataLossError, match="line 1, cannot be read .*delete the file"):
        made(tmp_path)


def test_the_same_results_make_the_same_page(tmp_path: Path) -> None:
    run(tmp_path / "runs/a", 0.5, tokens=3, rows=[failure()])
    assert made(tmp_path)[0] == made(tmp_path)[0]


def test_intervals_stand_on_their_bars() -> None:
    def whiskers(low: float) -> int:
        svg = plots.bars(["t", "u"], [plots.Bars("a", [50, 20], [low, np.nan], [60, np.nan])])
        return len(re.findall(r'id="LineCollection', svg.decode()))

    assert whiskers(40.0) == 1 and whiskers(np.nan) == 0
