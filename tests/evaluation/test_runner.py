"""The runner over the real cascade, with the stages of tests/cascade whose answers are known."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cascade.fakes import FakeEmbedder, FakeReasoner, FakeReranker, ecr, text_of
from tests.evaluation import layouts
from tte_jax.content import Content, Media, Text
from tte_jax.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from tte_jax.evaluation import outputs, runner
from tte_jax.evaluation.arms import Arm, Ecr, grid
from tte_jax.evaluation.metrics import Mode, Ranked
from tte_jax.evaluation.mmeb_v2.load import load
from tte_jax.evaluation.mmeb_v2.registry import BY_NAME, DATASETS
from tte_jax.evaluation.reasoners import Cached, Recorded
from tte_jax.evaluation.runner import ArmResult, Settings, Stages, TaskRunner
from tte_jax.evaluation.task import EvalTask, Item, Query


def text(value: str) -> Any:
    return lambda: Content.of(value)


def task(queries: dict[str, str], names: list[str], **kwargs: Any) -> EvalTask:
    return EvalTask(
        "toy",
        "image",
        "hit@1",
        tuple(Query(str(i), text(q), (right,)) for i, (q, right) in enumerate(queries.items())),
        lambda: iter([Item(n, text(n)) for n in names]),
        **kwargs,
    )


def stages(**kwargs: Any) -> Stages:
    parts = {"reasoner": FakeReasoner(), "embedder": FakeEmbedder(), "reranker": FakeReranker()}
    return Stages(**(parts | kwargs))


def run(
    given: EvalTask,
    arms: list[Arm],
    made: Stages | None = None,
    settings: Settings | None = None,
    **kwargs: Any,
) -> list[ArmResult]:
    async def all() -> list[ArmResult]:
        one = TaskRunner(given, made or stages(), settings or Settings(), **kwargs)
        return [result async for result in one.run(arms)]

    return asyncio.run(all())


NO_ECR = Arm(Ecr.NONE, 0)


def test_first_stage_ranks_and_scores() -> None:
    (result,) = run(task({"abba": "aabb", "cc": "c"}, ["aabb", "c", "d"]), [NO_ECR])
    assert [a.ranked.prediction[0] for a in result.answers] == ["aabb", "c"]
    assert len(result.answers[0].ranked.prediction) == 3
    assert result.pool == 3 and not result.failed


def test_ties_go_by_id_and_not_by_the_order_of_the_data() -> None:
    # "ab" and "ba" have one vector; the right one stands first in the data.
    (result,) = run(task({"ab": "ba"}, ["ba", "ab"]), [NO_ECR])
    assert result.answers[0].ranked.prediction == ("ab", "ba")


def test_local_pools_hold_only_their_own() -> None:
    query = Query("0", text("aa"), ("b",), pool=("b", "c"))
    given = EvalTask("toy", "image", "hit@1", (query,), task({}, ["aa", "b", "c"]).candidates)
    (result,) = run(given, [NO_ECR])
    assert set(result.answers[0].ranked.prediction) == {"b", "c"}


def test_arms_change_what_is_read() -> None:
    table = {"q": ecr("zz", "abc"), "abc": ecr("x", "abc"), "zz": ecr("x", "zz")}
    made = stages(reasoner=FakeReasoner(table))
    arms = [NO_ECR, Arm(Ecr.FULL, 32), Arm(Ecr.ANSWER, 32), Arm(Ecr.THINK, 32)]
    given = task({"q": "abc"}, ["abc", "zz"], ecr_target=False)
    results = run(given, arms, made)
    embedder = made.embedder
    assert isinstance(embedder, FakeEmbedder)
    queries = [i.reasoning for i in embedder.items if text_of(i.content) == "q"]
    assert queries == [
        "",
        "<think>zz</think>\nAnswer: abc",
        "Answer: abc",
        "<think>zz</think>",
    ]
    assert [r.answers[0].ranked.prediction[0] for r in results][1:3] == ["abc", "abc"]
    # The candidates are the same under all arms, and were embedded once.
    assert sum(text_of(i.content) == "zz" for i in embedder.items) == 1


def test_sides_of_the_published_method_and_both() -> None:
    for both, seen in ((False, {"q"}), (True, {"q", "a"})):
        reasoner = FakeReasoner()
        given = task({"q": "a"}, ["a"], ecr_target=False)
        run(given, [Arm(Ecr.FULL, 8)], stages(reasoner=reasoner), Settings(both_sides=both))
        assert {text_of(i.content) for i in reasoner.items} == seen


def test_rerank_and_rewrite_are_counted() -> None:
    made = stages(reranker=FakeReranker({"b": 0.9, "a": 0.1}))
    arm = Arm(Ecr.NONE, 0, depth=2)
    (result,) = run(task({"a": "b"}, ["a", "b", "c"]), [arm], made)
    answer = result.answers[0]
    # The pool is scored to the depth, and the tail keeps its order.
    assert answer.ranked.prediction == ("b", "a", "c") and answer.first[0] == "a"
    about = outputs.info(result, mode=Mode.EXACT, settings={})
    assert about["stages_per_query"]["rerank"]["tokens_in"] == 22
    qar = Arm(Ecr.FULL, 8, depth=2, rewrites=2, rewrite_tokens=4)
    (rewritten,) = run(task({"a": "b"}, ["a", "b"]), [qar])
    assert "rewrite" in outputs.info(rewritten, mode=Mode.EXACT, settings={})["stages_per_query"]


def test_rankings_of_another_system_are_reranked() -> None:
    made = stages(reranker=FakeReranker({"c": 0.9, "b": 0.5, "a": 0.1}))
    given = task({"a": "c"}, ["a", "b", "c"])
    rankings = [Ranked(("b", "c", "a"), ("c",))]
    off, on = run(given, [NO_ECR, Arm(Ecr.NONE, 0, depth=2)], made, rankings=rankings)
    assert off.answers[0].ranked.prediction == ("b", "c", "a")
    assert on.answers[0].ranked.prediction == ("c", "b", "a")
    with pytest.raises(InvalidInputError, match="1 queries and the rankings given 0"):
        run(given, [NO_ECR], made, rankings=[])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(("a", "b"), ("a",))], "2 queries and the rankings given 1"),
        ([(("a", "b"), ("a",))] * 3, "2 queries and the rankings given 3"),
        ([(("a", "b"), ("a",))] * 2, "row 2 of the rankings: its label has 'a', .* is 'b'"),
        (
            [(("a", "b"), ("a",)), (("a", "/x/b"), ("b",))],
            "row 2 of the rankings: it ranks 1 of the 2 candidates of query 1; the first that it "
            "lacks is 'b', and its own ids are 'a', '/x/b'",
        ),
    ],
)
def test_rankings_that_are_not_the_tasks_are_refused(rows: Any, said: str) -> None:
    rankings = [Ranked(*row) for row in rows]
    local = tuple(Query(str(i), text(n), (n,), pool=("a", "b")) for i, n in enumerate("ab"))
    for given in (
        task({"a": "a", "b": "b"}, ["a", "b"]),
        replace(task({}, ["a", "b"]), queries=local),
    ):
        with pytest.raises(InvalidInputError, match=f"toy.* {said}"):
            run(given, [NO_ECR], rankings=rankings)


def test_rankings_may_end_where_ours_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RANKED", 2)
    given = task({"a": "c"}, ["a", "b", "c"])
    (result,) = run(given, [NO_ECR], rankings=[Ranked(("b", "c"), ("c",))])
    assert result.answers[0].ranked.prediction == ("b", "c", "a")


def test_a_query_that_cannot_be_read_scores_nothing_and_is_counted() -> None:
    embedder = FakeEmbedder()
    embedder.refuse = lambda i: InvalidInputError("too long") if text_of(i.content) == "x" else None
    (result,) = run(task({"x": "a", "a": "a"}, ["a"]), [NO_ECR], stages(embedder=embedder))
    about = outputs.info(result, mode=Mode.EXACT, settings={})
    assert about["queries_failed"] == 1 and about["score"] == 0.5
    assert about["first_errors"] == ["too long"]


def test_a_stage_that_is_away_ends_the_run() -> None:
    made = stages(embedder=FakeEmbedder(broken=UnavailableError("away")))
    with pytest.raises(UnavailableError):
        run(task({"a": "a"}, []), [NO_ECR], made)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (UnavailableError("away", reason="UNREACHABLE"), UnavailableError),
        (OverloadedError("full"), UnavailableError),
        (DeadlineExceededError("late"), UnavailableError),
        (InternalError("not a number", reason="NAN"), InternalError),
        (ValueError("a defect"), InternalError),
    ],
)
@pytest.mark.parametrize("stage", ["reasoner", "reranker"])
def test_a_stage_that_an_arm_is_about_fails_and_the_run_ends(
    stage: str, error: Exception, raised: type[Exception]
) -> None:
    kind = {"reasoner": FakeReasoner, "reranker": FakeReranker}[stage]
    made = stages(**{stage: kind(broken=error)})
    given = task({"q": "a", "r": "b"}, ["a", "b"], ecr_target=False)
    with pytest.raises(raised, match=f"toy, full8-ecrr2, query .: The {stage} .* Run it again"):
        run(given, [Arm(Ecr.FULL, 8, depth=2)], made)


def test_what_a_model_refuses_of_the_data_stays_a_result() -> None:
    def refuse(candidates: Any) -> None:
        if "b" in " ".join(candidates):
            at = next(i for i, text in enumerate(candidates) if "b" in text)
            raise InvalidInputError("too long", field=f"candidates[{at}]", reason="TOO_LONG")

    reranker = FakeReranker()
    reranker.refuse = refuse
    (result,) = run(task({"a": "a"}, ["a", "b"]), [Arm(Ecr.NONE, 0, depth=2)],
                    stages(reranker=reranker))  # fmt: skip
    about = outputs.info(result, mode=Mode.EXACT, settings={})
    assert about["score"] == 1.0 and about["degraded"] == {"rerank: TOO_LONG": 1}


def test_recorded_ecrs_take_the_reasoners_place(tmp_path: Path) -> None:
    path = tmp_path / "ecrs.jsonl"
    rows = [
        {"task": "toy", "side": "query", "id": "0", "ecr": "<think>t</think>\nAnswer: abc"},
        {"task": "toy", "side": "target", "id": "zz", "ecr": "Answer: abc"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recorded = Recorded(path)
    made = stages(reasoner=recorded, recorded=recorded)
    (result,) = run(task({"q": "zz"}, ["q", "zz"]), [Arm(Ecr.FULL, 8)], made)
    assert result.answers[0].ranked.prediction[0] == "zz"
    about = outputs.info(result, mode=Mode.EXACT, settings={})
    assert about["recorded_ecrs"] == {
        "query": {"recorded": 1, "asked": 1},
        "target": {"recorded": 1, "asked": 2},
    }
    (none,) = run(task({"q": "zz"}, ["q", "zz"]), [NO_ECR], made)
    assert none.recorded == {}
    path.write_text('{"task": "toy"}\n')
    with pytest.raises(InvalidInputError, match="line 1: KeyError: 'side'"):
        Recorded(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "Toy", "side": "query", "id": "0"}, "its query side: the file has nothing"),
        ({"task": "toy", "side": "query", "id": "q0"}, "1 with other ids, such as 'q0'"),
        ({"task": "toy", "side": "target", "id": "/x/zz"}, "its target side: .* such as '/x/zz'"),
    ],
)
def test_recorded_ecrs_of_something_else_are_refused(
    row: dict[str, str], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "ecrs.jsonl"
    path.write_text(json.dumps(row | {"ecr": "Answer: abc"}))
    recorded = Recorded(path)
    made = stages(reasoner=recorded, recorded=recorded)
    with pytest.raises(InvalidInputError, match=f"toy: no recorded ECR .* {said}"):
        run(task({"q": "zz"}, ["q", "zz"]), [Arm(Ecr.FULL, 8)], made)
    # A side of which nothing is recorded is left without, on purpose.
    path.write_text(json.dumps({"task": "toy", "side": "query", "id": "0", "ecr": "Answer: z"}))
    recorded = Recorded(path)
    (result,) = run(
        task({"q": "zz"}, ["q", "zz"]),
        [Arm(Ecr.FULL, 8)],
        stages(reasoner=recorded, recorded=recorded),
    )
    assert result.recorded == {"query": (1, 1), "target": (0, 2)}


def test_cached_ecrs_outlive_the_run(tmp_path: Path) -> None:
    path = tmp_path / "ecrs.jsonl"
    given = task({"q": "a"}, ["a", "b"])
    counts = []
    for models in ("one", "one", "two"):
        reasoner = FakeReasoner()
        made = stages(reasoner=Cached(reasoner, path, models=models))
        (result,) = run(given, [Arm(Ecr.FULL, 8)], made)
        counts.append(len(reasoner.items))
    # Two candidates and the query; then the query alone; another model's are not used.
    assert counts == [3, 1, 3]


def test_grid() -> None:
    arms = grid(
        ["none", "full"],
        ["off", "ecrr+qar"],
        budgets=[32, 64],
        depths=[5],
        rewrites=9,
        rewrite_tokens=16,
    )
    assert [a.name for a in arms] == [
        "none",
        "none-ecrr5-qar5x16",
        "full32",
        "full64",
        "full32-ecrr5-qar5x16",
        "full64-ecrr5-qar5x16",
    ]
    with pytest.raises(InvalidInputError, match="'half' is not one of none, full"):
        grid(["half"], ["off"], budgets=[1], depths=[1], rewrites=1, rewrite_tokens=1)


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--depths", {"depths": [10, 257]}),
        ("--budgets", {"budgets": [4097]}),
        ("--qar-depth", {"rewrites": 51}),
        ("--qar-tokens", {"rewrite_tokens": 4097}),
        ("--qar-depth", {"rewrites": 0}),
    ],
)
def test_a_grid_beyond_what_a_search_may_ask_for_is_refused(
    flag: str, given: dict[str, Any]
) -> None:
    good = {"budgets": [64], "depths": [10], "rewrites": 10, "rewrite_tokens": 64}
    with pytest.raises(InvalidInputError, match=f"{flag} needs .* at most"):
        grid(["full"], ["ecrr+qar"], **(good | given))


# --- files ---


def test_files_are_the_references_and_ours(tmp_path: Path) -> None:
    (result,) = run(task({"abba": "aabb", "c": "d"}, ["aabb", "c", "d"]), [NO_ECR])
    outputs.write(tmp_path, result, mode=Mode.EXACT, settings={"limit": 0})
    scores = outputs.read_json(tmp_path / "image/toy_score.json")
    assert scores["hit@1"] == 0.5 and scores["num_pred"] == scores["num_data"] == 2
    assert all(isinstance(v, int | float) for v in scores.values())
    assert outputs.read_predictions(tmp_path / "image/toy_pred.jsonl") == result.ranked
    (failure,) = [json.loads(line) for line in (tmp_path / "image/toy_failures.jsonl").open()]
    assert failure["label"] == ["d"] and failure["rank"] == 3
    assert failure["results"][0]["id"] == "c"
    assert outputs.done(tmp_path, "toy", "image", {"limit": 0})
    assert not outputs.done(tmp_path, "other", "image", {"limit": 0})
    with pytest.raises(InvalidInputError, match=r"other settings \(limit\)"):
        outputs.done(tmp_path, "toy", "image", {"limit": 5})


def test_an_interrupted_overwrite_leaves_no_older_score_beside_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (result,) = run(task({"a": "a"}, ["a", "b"]), [NO_ECR])
    outputs.write(tmp_path, result, mode=Mode.EXACT, settings={})
    files = {path.name: path.read_text() for path in (tmp_path / "image").iterdir()}

    def torn(*_: Any) -> None:
        raise KeyboardInterrupt

    # While wrong answers are gathered, nothing is touched.
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "failures", torn)
        with pytest.raises(KeyboardInterrupt):
            outputs.write(tmp_path, result, mode=Mode.EXACT, settings={})
    assert files == {path.name: path.read_text() for path in (tmp_path / "image").iterdir()}
    assert outputs.done(tmp_path, "toy", "image", {})
    monkeypatch.setattr(outputs, "_lines", torn)
    with pytest.raises(KeyboardInterrupt):
        outputs.write(tmp_path, result, mode=Mode.EXACT, settings={})
    assert not outputs.done(tmp_path, "toy", "image", {})


class ByColour(FakeEmbedder):
    """Knows the solid colours of `layouts`, in images and in the first frame of videos."""

    async def embed(self, items: Any, **kwargs: Any) -> Any:
        plain = []
        for item in items:
            seen = [_colour(m) for m in item.content.media]
            # A question names all colours; a picture decides where there is one.
            words = seen or [item.content.text]
            content = Content((Text(" ".join(words)),))
            plain.append(type(item)(content, item.side, item.reasoning, item.instruction))
        return await super().embed(plain, **kwargs)


def _colour(media: Media) -> str:
    import base64
    import io

    from PIL import Image, ImageColor

    data = outputs.thumbnail(Content((media,))).partition(",")[2]
    pixel = Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 4))
    assert isinstance(pixel, tuple)

    def far(name: str) -> float:
        return sum(abs(a - b) for a, b in zip(ImageColor.getrgb(name), pixel, strict=True))

    return min(layouts.COLOURS, key=far)


def test_all_78_run_dry_through_the_real_cascade(tmp_path: Path) -> None:
    root = layouts.write_all(tmp_path / "data")
    began = time.monotonic()
    for info in DATASETS:
        (result,) = run(load(info, root), [NO_ECR], stages(embedder=ByColour()))
        about = outputs.write(tmp_path / "out", result, mode=Mode.EXACT, settings={})
        # What is right is known: everything, but for what the colours do not tell.
        if info.name not in ("ActivityNetQA", "MVBench"):
            assert about["score"] == pytest.approx(1.0), info.name
    assert time.monotonic() - began < 20 * 60
    assert len(list((tmp_path / "out").rglob("*_score.json"))) == 78
    assert BY_NAME.keys() == {p.name[:-11] for p in (tmp_path / "out").rglob("*_score.json")}
