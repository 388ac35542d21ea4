"""`tte eval` as a user calls it: output, files, exit codes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from tests.cascade.fakes import FakeEmbedder, FakeReasoner, FakeReranker
from tests.cli.conftest import Tte, document
from tests.evaluation import layouts
from tte_jax.cli import evaluation_run, inspection
from tte_jax.cli.output import Output
from tte_jax.evaluation.runner import Stages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mmeb")
    layouts.write_images(root)
    layouts.write_pages(root)
    return root


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> FakeEmbedder:
    """The runs' models: those of tests/cascade, which read pictures as text of no sense."""
    made = _Embedder()

    @contextlib.asynccontextmanager
    async def opened(plan: evaluation_run.Plan, out: Output) -> AsyncIterator[Stages]:
        yield Stages(_Reasoner(), made, FakeReranker(), {"embedder": {"version": "fake"}})

    monkeypatch.setattr(evaluation_run, "open_stages", opened)
    return made


class _Reasoner(FakeReasoner):
    async def reason(self, items, **kwargs):  # noqa: ANN001, ANN003, ANN201
        return await super().reason([_worded(i) for i in items], **kwargs)


class _Embedder(FakeEmbedder):
    async def embed(self, items, **kwargs):  # noqa: ANN001, ANN003, ANN201
        return await super().embed([_worded(i) for i in items], **kwargs)


def _worded(item):  # noqa: ANN001, ANN202
    from dataclasses import replace

    from tte_jax.content import Content

    content = item.content
    letters = "".join(chr(97 + m.data[-20] % 26) for m in content.media)
    return replace(item, content=Content.of(content.text or letters or "x"))


def test_list(tte: Tte) -> None:
    rows = document(tte("eval", "mmeb-v2", "--list", "--json"))
    assert len(rows) == 78
    assert {"name", "modality", "pool", "metric"} <= rows[0].keys()
    shown = tte("eval", "mmeb-v2", "--list", "--tasks", "video/qa")
    assert shown.exit_code == 0 and "Video-MME" in shown.output and "GQA" not in shown.output


def test_missing_data_is_a_list_of_what_to_get(tte: Tte, tmp_path: Path) -> None:
    result = tte("eval", "mmeb-v2", "--data", tmp_path, "--tasks", "MSVD", "--json")
    assert result.exit_code == 3
    error = document(result)["error"]
    assert error["reason"] == "MISSING_DATA"
    assert "hf download --repo-type dataset VLM2Vec/MSVD" in error["message"]
    assert "Error:" in result.stderr and "Traceback" not in result.output


def test_run_resume_report_compare(
    tte: Tte, data: Path, tmp_path: Path, embedder: FakeEmbedder
) -> None:
    out = tmp_path / "out"
    flags = ("eval", "mmeb-v2", "--data", data, "--out", out, "--tasks", "SUN397,ViDoRe_docvqa")
    arms = ("--ecr", "none,full", "--rerank", "off,ecrr", "--depths", "2", "--json")
    ran = tte(*flags, *arms)
    assert ran.exit_code == 0, ran.output
    shown = document(ran)
    assert {run["name"] for run in shown["runs"]} == {
        "out/none",
        "out/none-ecrr2",
        "out/full64",
        "out/full64-ecrr2",
    }
    # A part of the benchmark has no mean, and no All.
    assert all(m["value"] is None for run in shown["runs"] for m in run["means"].values())
    about = json.loads((out / "full64-ecrr2/image/SUN397_info.json").read_text())
    assert about["settings"]["models"] == {"embedder": {"version": "fake"}}
    assert about["settings"]["page_fix"] is True and about["arm"]["depth"] == 2
    assert about["tokens_per_query"] > 0 and "interval" in about

    # A picture alone is no text that the reranker could read, and that shows.
    said = "degraded (rerank: NO_QUERY_TEXT)"
    assert f"; {said}: 3" in " ".join(ran.stderr.split())
    shown = tte("eval", "report", out / "none-ecrr2")
    assert "*" in shown.output and f"1 of 2 tasks: {said}: 3." in " ".join(shown.output.split())
    assert "*" not in tte("eval", "report", out / "none").output

    calls = embedder.calls
    again = tte(*flags, *arms)
    assert again.exit_code == 0 and embedder.calls == calls
    assert "SUN397: done before" in again.stderr
    other = tte(*flags, *arms, "--limit", "2")
    assert other.exit_code == 2 and "other settings (limit)" in other.stderr

    page = tmp_path / "page.html"
    shown = tte("eval", "report", out, "--html", page)
    assert shown.exit_code == 0, shown.output
    assert "(1 of 36)" in shown.output and "SUN397" in shown.output
    text = page.read_text()
    assert "Quality against tokens" in text and "data:image/svg+xml;base64," in text
    assert "Wrong answers" in text and "class='case'" in text

    nowhere = tte("eval", "report", out, "--html", page / "below.html")
    assert nowhere.exit_code == 2 and "cannot be written" in nowhere.stderr

    compared = tte("eval", "compare", out / "none", out / "full64", "--json")
    assert compared.exit_code == 0, compared.output
    assert document(compared)["tasks"]["SUN397"]["queries"] == 3
    gate = ("eval", "compare", "--gate")
    assert tte(*gate, out / "none", out / "none").exit_code == 0
    many = tte("eval", "compare", out, out / "none")
    assert many.exit_code == 2 and "holds 4 runs" in many.stderr


def test_what_the_flags_name_is_of_the_settings_by_content(
    tte: Tte, data: Path, tmp_path: Path, embedder: FakeEmbedder
) -> None:
    flags = ("eval", "mmeb-v2", "--data", data, "--tasks", "SUN397", "--ecr", "none")
    first = tmp_path / "first"
    assert tte(*flags, "--out", first).exit_code == 0
    said, ecrs = tmp_path / "said.json", tmp_path / "ecrs.jsonl"
    said.write_text('{"MSVD": {"query": "Find it."}}')
    ecrs.write_text('{"task": "SUN397", "side": "query", "id": "0", "ecr": "Answer: red"}')
    rankings = first / "none/image"
    pred = rankings / "SUN397_pred.jsonl"
    for flag, given, file in (
        ("--instructions", said, said),
        ("--ecrs", ecrs, ecrs),
        ("--rankings", rankings, pred),
    ):
        out = ("--out", tmp_path / flag, flag, given)
        assert tte(*flags, *out).exit_code == 0
        file.write_text(" " + file.read_text())
        other = tte(*flags, *out)
        assert other.exit_code == 2, flag
        name = {"--rankings": "first_stage"}.get(flag, flag[2:])
        assert f"other settings ({name})" in " ".join(other.stderr.split())
    # Of rankings, only the task's own; of these, as many as of the queries.
    limited = tte(*flags, "--out", tmp_path / "two", "--rankings", rankings, "--limit", "2")
    assert limited.exit_code == 0, limited.output


def test_a_run_of_which_nothing_came_says_why(
    tte: Tte, data: Path, tmp_path: Path, embedder: FakeEmbedder
) -> None:
    flags = ("eval", "mmeb-v2", "--data", data, "--tasks", "SUN397", "--ecr", "none")
    ran = tte(*flags, "--out", tmp_path / "none", "--rankings", tmp_path, "--json")
    assert ran.exit_code == 1, ran.output
    assert "no SUN397_pred.jsonl" in document(ran)["failed"]["SUN397"] and not document(ran)["runs"]
    empty = tte(*flags, "--out", tmp_path / "none", "--shard", "2/2", "--json")
    assert empty.exit_code == 0 and "Nothing in this shard" in empty.stderr
    assert document(empty) == {"runs": [], "failed": {}, "left_out": []}


def test_missing_tasks_are_left_out_only_when_asked(
    tte: Tte, data: Path, tmp_path: Path, embedder: FakeEmbedder
) -> None:
    flags = ("eval", "mmeb-v2", "--data", data, "--out", tmp_path, "--tasks", "SUN397,MSVD")
    assert tte(*flags).exit_code == 3
    partly = tte(*flags, "--ecr", "none", "--skip-missing", "--json")
    assert partly.exit_code == 1
    assert document(partly)["left_out"] == ["MSVD"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--tasks", "Imagenet"), "Did you mean ImageNet-1K"),
        (("--ecr", "some"), "'some' is not one of none, full, think, answer"),
        (("--budgets", "many"), "no list of whole numbers"),
        (("--depths", "0"), "at least 1"),
        (("--shard", "3/2"), "is not i/n"),
        (("--instructions", "nowhere.json"), "no instructions file"),
    ],
)
def test_bad_input_is_named(flags: tuple[str, ...], named: str, tte: Tte, data: Path) -> None:
    result = tte("eval", "mmeb-v2", "--data", data, "--tasks", "SUN397", *flags)
    assert result.exit_code in (2, 3)
    assert named in " ".join(result.stderr.split())


def test_recorded_ecrs_make_one_arm_and_no_rewrites(tte: Tte, data: Path, tmp_path: Path) -> None:
    (tmp_path / "ecrs.jsonl").touch()
    flags = ("eval", "mmeb-v2", "--data", data, "--tasks", "SUN397")
    flags += ("--ecrs", tmp_path / "ecrs.jsonl", "--out", tmp_path / "out")
    for more, named in (
        (("--budgets", "32,64"), "several --budgets are the same arm"),
        (("--rerank", "ecrr+qar"), "hold no rewrites"),
    ):
        result = tte(*flags, *more)
        assert result.exit_code == 2 and named in " ".join(result.stderr.split())


def test_no_data_folder(tte: Tte) -> None:
    result = tte("eval", "mmeb-v2")
    assert result.exit_code == 2 and "is no folder" in result.stderr
    assert tte("eval", "report", "nowhere").exit_code == 3


def test_mini(tte: Tte, tmp_path: Path, embedder: FakeEmbedder) -> None:
    flags = ("eval", "mini", "--data", tmp_path / "data", "--out", tmp_path / "out")
    flags += ("--tasks", "mini-t2i,image/qa,video/moment_retrieval")
    # What is downloaded is what a test has put there.
    cache = tmp_path / "data" / "packages"
    cache.mkdir(parents=True)
    (cache / "easy_vqa-1.0-py3-none-any.whl").write_bytes(b"not the pinned one")
    torn = tte(*flags, "--queries", "3", TTE_DATA_DIR=tmp_path / "data")
    assert torn.exit_code != 0 and "expected fcb51b30" in " ".join(torn.stderr.split())
    chosen = (*flags[:-1], "mini-t2i,mini-qa,mini-moments", "--queries", "3")
    ran = tte(*chosen, "--ecr", "none", "--json")
    assert ran.exit_code == 0, ran.output
    (run,) = document(ran)["runs"]
    assert list(run["tasks"]) == ["mini-qa", "mini-t2i", "mini-moments"]
    about = json.loads((tmp_path / "out/none/video/mini-moments_info.json").read_text())
    assert about["chance"] == pytest.approx(1 / 5) and about["frames"] == 8
    other = tte(*flags, "--queries", "4")
    assert other.exit_code == 2 and "with 3 queries" in " ".join(other.stderr.split())
    again = tte(*chosen, "--ecr", "none")
    assert again.exit_code == 0 and "mini-qa: done before" in again.stderr
    # Other data may be made in another folder, and are no results of these.
    data = ("--data", tmp_path / "more", "--tasks", "mini-t2i", "--queries", "4")
    more = tte("eval", "mini", *data, "--out", tmp_path / "out", "--ecr", "none")
    assert more.exit_code == 2 and "other settings (data)" in " ".join(more.stderr.split())


def test_mini_list(tte: Tte) -> None:
    shown = tte("eval", "mini", "--list")
    assert shown.exit_code == 0, shown.output
    assert "r-doc-pdf" in shown.output and "10 MB" in shown.output
    rows = {row["name"]: row for row in document(tte("eval", "mini", "--list", "--json"))}
    assert all(name in shown.output for name in rows)
    assert rows["mini-t2v"]["like"] == "MSVD" and rows["mini-manual"]["modality"] == "visdoc"
    assert rows["mini-maps"]["packages"][0]["registry"] == "Debian"
    (one,) = document(tte("eval", "mini", "--list", "--tasks", "mini-qa", "--json"))
    assert one["name"] == "mini-qa"
    wrong = tte("eval", "mini", "--tasks", "mini-quiz")
    assert wrong.exit_code == 2 and "is no task of mini-MMEB" in " ".join(wrong.stderr.split())


def test_the_gate_stops_a_drop(tte: Tte, tmp_path: Path) -> None:
    for name, predictions in (("good", ["a"] * 50), ("bad", ["a"] * 20 + ["x"] * 30)):
        folder = tmp_path / name / "image"
        folder.mkdir(parents=True)
        rows = [{"prediction": [p], "label": ["a"], "rel_scores": None} for p in predictions]
        (folder / "SUN397_pred.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "SUN397_score.json").write_text('{"hit@1": 0.0}')
    flags = ("eval", "compare", "--gate")
    assert tte(*flags, tmp_path / "bad", tmp_path / "good").exit_code == 0
    dropped = tte(*flags, tmp_path / "good", tmp_path / "bad")
    assert dropped.exit_code == 1 and "does not pass" in dropped.stderr


def test_running_services_are_the_stages(
    running: Tte, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # Without an ECR these services' embedder knows nothing of pictures.
    arms = ("--ecr", "full", "--rerank", "off,ecrr+qar", "--depths", "3", "--both-sides")
    flags = ("--data", data, "--out", out, "--tasks", "MSCOCO_t2i", "--services")
    ran = running("eval", "mmeb-v2", *flags, *arms, "--json")
    assert ran.exit_code == 0, ran.output
    about = json.loads((out / "full64-ecrr3-qar3x64/image/MSCOCO_t2i_info.json").read_text())
    # The services' models name colours, which is what this task asks.
    assert about["score"] == 1.0 and about["queries_failed"] == 0 and not about["degraded"]
    # Not where they run: a restart changes addresses, and at one address another model may come up.
    assert about["settings"]["models"] == {
        role: {"version": f"{role}-1", "service": True}
        for role in ("reasoner", "embedder", "reranker")
    }
    assert {"reason", "embed", "rewrite", "rerank"} <= about["stages_per_query"].keys()

    def changed(reasoner: str) -> Callable[..., list[inspection.Seen]]:
        def look(where: Mapping[str, str], **_: object) -> list[inspection.Seen]:
            found = {"reasoner": reasoner, "embedder": "embedder-1", "reranker": "reranker-1"}
            return [
                inspection.Seen(role, where[role], "SERVING", {"model_version": found[role]})
                for role in where
            ]

        return look

    monkeypatch.setattr(inspection, "look", changed("reasoner-2"))
    other = running("eval", "mmeb-v2", *flags, *arms)
    assert other.exit_code == 2 and "other settings (models)" in " ".join(other.stderr.split())
    monkeypatch.setattr(inspection, "look", changed(""))
    silent = running("eval", "mmeb-v2", *flags, *arms)
    assert silent.exit_code == 4 and "which model it runs" in " ".join(silent.stderr.split())
