"""Tables, verdicts and figures of `benchmarks.experiments`.

No verdict is typed: it is read off the interval of a paired difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from scipy.stats import spearmanr

from benchmarks.markdown import table

Result = Mapping[str, Any]
COMMAND = "python -m benchmarks.experiments"
AGREES, OPPOSITE, OPEN = "agrees", "the opposite", "no difference shown"


def outcome(comparison: Result) -> str:
    """What came out: "better", "worse", or that no difference was shown."""
    if comparison["low"] > 0:
        return "better"
    return "worse" if comparison["high"] < 0 else OPEN


def verdict(comparison: Result) -> str:
    """Whether what came out is what the papers say; "–" where they say nothing."""
    if not comparison["says"]:
        return "–"
    return {"better": AGREES, "worse": OPPOSITE}.get(outcome(comparison), OPEN)


def summary(result: Result) -> str:
    """How many of the claims agree, by experiment, and how it was run."""
    rows = []
    for name, title in _TITLES.items():
        found = result["experiments"].get(name)
        counts = Counter(verdict(c) for c in found["comparisons"] if c["says"]) if found else {}
        seconds = sum(row["seconds"] for row in found["rows"].values()) if found else 0
        cells = [str(counts.get(word, 0)) if found else "–" for word in (AGREES, OPEN, OPPOSITE)]
        rows.append([title, *cells, f"{seconds / 60:.0f}" if found else "–"])
    head = ["claims compared", AGREES, OPEN, OPPOSITE, "minutes of its pieces"]
    return table(head, rows) + _footnote(result)


def budget(result: Result) -> str:
    """Quality against tokens, spent on both sides and on queries alone."""

    def cells(row: Result) -> list[str]:
        shares = [_percent(row[key]) for key in ("cut", "queries_right", "documents_right")]
        return [f"{row['tokens_per_query']:.1f}", *shares]

    head = ["tokens a query", "queries' ECRs cut short, %", "queries' ECRs right, %",
            "candidates' ECRs right, %"]  # fmt: skip
    return _experiment(result, "budget", "budget", head, cells)


def ablation(result: Result) -> str:
    """The stages one after the other, and where the reasonings are right and where not."""

    def cells(row: Result) -> list[str]:
        return [f"{row['tokens_per_query']:.1f}"]

    text = _experiment(result, "ablation", "arm", ["tokens a query"], cells)
    found = result["experiments"].get("ablation")
    if not found or not (rows := found.get("split")):
        return text
    arms = list(rows[0]["hit@1"])
    said = {"both": "of query and right candidate", "one": "of one of them", "none": "of neither"}
    body = [
        [result["titles"][r["task"]], said[r["right"]], str(r["queries"]),
         *(_percent(r["hit@1"][arm]) for arm in arms)]
        for r in rows
    ]  # fmt: skip
    head = ["query → document", "the ECR is right", "queries", *(f"{arm}, hit@1 %" for arm in arms)]
    return text + table(head, body)


def strength(result: Result) -> str:
    """The embedder fixed, reasoners of different strength in front of it."""

    def cells(row: Result) -> list[str]:
        return [_percent(row["queries_right"]), _percent(row["documents_right"])]

    head = ["queries' ECRs right, %", "candidates' ECRs right, %"]
    text = _experiment(result, "strength", "reasoner", head, cells)
    if found := result["experiments"].get("strength"):
        rows = list(found["rows"].values())
        rho = spearmanr([r["right"] for r in rows], [r["hit@1"] for r in rows])[0]
        text += (
            f"\nRank correlation (Spearman) of right ECRs and hit@1 over these {len(rows)} "
            f"reasoners: {rho:+.2f}.\n"
        )
    return text


def _experiment(
    result: Result, name: str, what: str, more: list[str], cells: Callable[[Result], list[str]]
) -> str:
    found = result["experiments"].get(name)
    if not found:
        return f"*Not measured yet: `{COMMAND} --only {name}` makes this table.*\n"
    titles: Mapping[str, str] = result["titles"]
    rows = [
        [
            label,
            *cells(row),
            *(_percent(row["tasks"][task]["hit@1"]) for task in titles),
            _mean(row),
        ]
        for label, row in found["rows"].items()
    ]
    head = [what, *more, *(f"{title}, hit@1 %" for title in titles.values()), "mean (95 %)"]
    tasks = next(iter(found["rows"].values()))["tasks"]
    sizes = ", ".join(f"{titles[t]} {r['queries']:,} of {r['pool']:,}" for t, r in tasks.items())
    return (
        f"\n![{_TITLES[name]}](figures/{name}.svg)\n"
        + table(head, rows)
        + f"\nQueries, and candidates of each: {sizes}.\n"
        + _claims(found)
    )


def _claims(found: Result) -> str:
    rows = [
        [
            c["says"] or "(nothing)",
            f"{c['worse']} → {c['better']}",
            f"{100 * c['difference']:+.1f} ({100 * c['low']:+.1f} to {100 * c['high']:+.1f})",
            outcome(c),
            verdict(c),
        ]
        for c in found["comparisons"]
    ]
    level = 100 * found["comparisons"][0]["level"]
    head = ["the papers say", "compared", f"points of hit@1 ({level:.1f} % interval)", "here",
            "with the papers"]  # fmt: skip
    return table(head, rows)


def _mean(row: Result) -> str:
    low, high = row["interval"]
    return f"{_percent(row['hit@1'])} ({_percent(low)} to {_percent(high)})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _footnote(result: Result) -> str:
    versions = ", ".join(f"`{v}`" for v in dict.fromkeys(result["settings"]["models"].values()))
    machine = result["machine"]
    noisy = " **Other work ran on the machine meanwhile.**" if result["noisy"] else ""
    return (
        f"\n`{result['command']}`, {result['date']}, commit {result['commit']}: {versions}; "
        f"{machine['cores']} cores ({machine['cpu']}), jax {result['versions']['jax']}.{noisy}\n"
    )


_TITLES = {
    "budget": "Token budget",
    "ablation": "Reranking and rewriting",
    "strength": "Strength of the reasoner",
}
