"""Tables of the built-in models' figures: held-out ones, from `training.builtin.evaluate`, what is
held out, and mini-MMEB, from `benchmarks.mini`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.markdown import table

ARMS = {
    "chance": "chance",
    "none": "no reasoning",
    "ecr": "ECR",
    "ecr+ecrr": "ECR + rerank (ECRR)",
}
MINI_ARMS = {
    "none": ARMS["none"],
    "full64": ARMS["ecr"],
    "full64-ecrr10": ARMS["ecr+ecrr"],
}
_HELD_OUT = {
    "families of emoji (concepts)": "training/data/heldout_families.txt",
    "combinations of family, gender and skin tone": "training/data/heldout_combinations.txt",
}


def summary(result: Mapping[str, Any]) -> str:
    """hit@1 / hit@10 of every arm, a row per task."""
    rows = []
    for task, figures in result["tasks"].items():
        arms = [_pair(figures[arm]) if arm in figures else "–" for arm in ARMS]
        rows.append([task, f"{figures['about']['pool']:,}", *arms, _worth(figures)])
    head = ["query → document, hit@1 / hit@10", "pool", *ARMS.values(),
            "reasoning is worth, points of hit@1"]  # fmt: skip
    return table(head, rows) + _footnote(result)


def full(result: Mapping[str, Any]) -> str:
    """With 95 % intervals, numbers of queries, and the split into seen and unseen."""
    rows = []
    for task, figures in result["tasks"].items():
        about = figures["about"]
        for arm, label in ARMS.items():
            if arm not in figures:
                continue
            own = figures[arm]
            rows.append([task, label, _with_interval(own, 1), _with_interval(own, 10),
                         f"{about['queries']:,}", f"{about['pool']:,}"])  # fmt: skip
            for mark, part in own.get("by", {}).items():
                rows.append(["", f"· {mark}", _with_interval(part, 1), _with_interval(part, 10),
                             f"{part['queries']:,}", f"{about['pool']:,}"])  # fmt: skip
    head = ["query → document", "arm", "hit@1", "hit@10", "queries", "pool"]
    return table(head, rows) + _footnote(result)


def held_out() -> str:
    """How many concepts and combinations training never saw, counted in the committed lists."""
    rows = []
    for what, path in _HELD_OUT.items():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        count = sum(bool(line) and not line.startswith("#") for line in lines)
        rows.append([what, str(count), f"`{path}`"])
    return table(["held out in every style", "number", "list"], rows)


def mini_mmeb(result: Mapping[str, Any]) -> str:
    """Score and 95 % interval of every arm, a row per task, beside chance."""
    rows = []
    for name, task in result["tasks"].items():
        group = task["group"].replace("_", " ") if task["modality"] != "visdoc" else "pages"
        arms = [_against_chance(task["arms"][arm], task["chance"]) for arm in MINI_ARMS]
        rows.append([f"`{name}`", f"{task['modality']}, {group}", task["like"],
                     f"{task['pool']:,}", f"{100 * task['chance']:.1f}", *arms])  # fmt: skip
    head = ["task", "kind", "layout of", "candidates in all", "chance", *MINI_ARMS.values()]
    models = ", ".join(dict.fromkeys(f"`{m['version']}`" for m in result["models"].values()))
    queries = sorted({task["queries"] for task in result["tasks"].values()})
    count = " to ".join(dict.fromkeys(str(n) for n in (queries[0], queries[-1])))
    return table(head, rows) + (
        f"\n`{result['command']}`, {result['date']}, commit {result['commit']}: {models}; {count} "
        "queries a task. hit@1 in percent, of pages `ndcg_linear@5`, with 95 % intervals. Bold: "
        "the whole interval is above chance.\n"
    )


def _against_chance(figures: Mapping[str, float], chance: float) -> str:
    low, high = 100 * figures["low"], 100 * figures["high"]
    score = f"{100 * figures['score']:.1f}"
    score = f"**{score}**" if figures["low"] > chance else score
    return f"{score} ({low:.0f} to {high:.0f})"


def _pair(figures: Mapping[str, Any]) -> str:
    return f"{figures['hit@1']:.3f} / {figures['hit@10']:.3f}"


def _with_interval(figures: Mapping[str, Any], k: int) -> str:
    value = f"{figures[f'hit@{k}']:.3f}"
    if interval := figures.get(f"hit@{k}_ci95"):
        value += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return value


def _worth(figures: Mapping[str, Any]) -> str:
    if "none" not in figures or "ecr" not in figures:
        return "–"
    return f"{100 * (figures['ecr']['hit@1'] - figures['none']['hit@1']):+.1f}"


def _footnote(result: Mapping[str, Any]) -> str:
    models = ", ".join(dict.fromkeys(f"`{m}`" for m in result["models"].values() if m))
    return (
        f"\n`{result['command']}`: {models}; {result['budget']} reasoning tokens, first "
        f"{result['rerank_depth']} reranked. One right picture a query; chance is one draw from "
        "the pool.\n"
    )
