"""Tables of what the trainers and the mining loop were shown to do: arms of hard negatives,
injected false negatives, GradCache, speed against PyTorch, kills. Verdicts come from the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import table

ARMS = {
    "none": "none",
    "random": "random",
    "embedder": "nearest by the embedder",
    "reranker-unfiltered": "reranker, no filter",
    "reranker": "reranker, filtered",
}
_GOAL_KEPT_OUT = 0.95
_GOAL_SPEED = 1.3
_GOAL_GRADIENT = 1e-6
_GOAL_TRAIN_S = 3 * 3600


def arms(result: Mapping[str, Any]) -> str:
    """Means and spreads of every arm, each task's hit@1, then the claim step by step."""
    tasks = list(result["asked"])
    rows = [["*the start*", *_pair(result["start"], spread=False), "–", "–", "–"]]
    rows += [
        [
            ARMS[name],
            *_pair(figures),
            f"{figures['negatives']:.1f}",
            *(
                f"{100 * figures[share]:.1f} %" if figures["negatives"] else "–"
                for share in ("false", "near")
            ),
        ]
        for name, figures in result["arms"].items()
    ]
    made = table(
        ["hard negatives", "hit@1", "MRR", "negatives a query", "of them the wanted thing",
         "of the ten nearest"],
        rows,
    )  # fmt: skip
    by_task = [
        [ARMS[name], *(f"{figures['hit@1']['tasks'][t]:.3f}" for t in tasks)]
        for name, figures in result["arms"].items()
    ]
    made += table(["hit@1 by task", *tasks], by_task)
    claims = [
        [_claim(name), *_difference(figures["hit@1"]), *_difference(figures["mrr"])[:1],
         figures["mrr"]["verdict"]]
        for name, figures in result["differences"].items()
    ]  # fmt: skip
    made += table(
        ["difference", "hit@1, points (95 %)", "by seed", "verdict", "MRR, points (95 %)",
         "verdict"],
        claims,
    )  # fmt: skip
    recipe = result["recipe"]
    return made + (
        f"\n{len(recipe['seeds'])} seeds, mean ± standard deviation over them; {recipe['steps']} "
        f"steps of {recipe['batch']} queries with at most {recipe['negatives']} negatives each, "
        f"{result['queries']:,} training queries, {result['documents']:,} documents, "
        f"{sum(result['asked'].values()):,} held-out queries. Intervals are over queries, paired; "
        "a verdict other than *no difference* needs an interval without 0 and one sign in every "
        f"seed.{_footnote(result)}"
    )


BUILTIN_ARMS = {"none": "no reasoning", "ecr": "ECR", "ecr+ecrr": "ECRR"}
ROUND_ARMS = {"none": "no reasoning", "ecr": "ECR"}


def rounds(result: Mapping[str, Any]) -> str:
    """The retriever after every round, then what each round changed and what it was made from."""
    rows = [
        [
            label,
            *(
                "{:.1f} ({:.1f} to {:.1f})".format(
                    *(100 * x for x in (own[metric]["mean"], *own[metric]["interval"]))
                )
                for own in arms.values()
                for metric in own
            ),
        ]
        for label, arms in result["states"].items()
    ]
    head = [
        f"{ROUND_ARMS[arm]}, {metric} (95 %)"
        for arm, own in result["states"]["begin"].items()
        for metric in own
    ]
    made = "\n![Rounds](figures/rounds.svg)\n\n" + table(["retriever", *head], rows)
    rows = [
        [
            f"round {row['round'] + 1}",
            *(
                "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in row["difference"][arm]))
                for arm in ROUND_ARMS
            ),
            "kept" if row["kept"] else "dropped",
            f"{row['mined']['negatives'] / row['mined']['records']:.1f}",
            f"{row['mined']['false_negatives'] / row['mined']['records']:.1f}",
        ]
        for row in result["rounds"]
    ]
    made += table(
        ["", *(f"{name}, points of MRR (95 %)" for name in ROUND_ARMS.values()),
         "the retriever is", "negatives a query", "taken for false negatives"],
        rows,
    )  # fmt: skip
    models = result["rounds"][0]["models"]
    return made + (
        f"\n{sum(result['queries'].values())} training queries a round, {result['steps']} steps; "
        f"{sum(result['asked'].values())} held-out queries of {len(result['asked'])} tasks. Each "
        "round begins from the retriever that was kept last. "
        f"{', '.join(f'`{name}`' for name in sorted(set(models.values())))}.{_footnote(result)}"
    )


def false_negatives(result: Mapping[str, Any]) -> str:
    """Duplicates among the negatives by filter, then what the filter is worth."""
    rows = []
    for name, figures in result["arms"].items():
        goal = "" if not name.startswith("reranker,") and name != "reranker" else (
            " ✓" if figures["kept_out"] >= _GOAL_KEPT_OUT else " (below the goal)"
        )  # fmt: skip
        label = ARMS.get(name, name)
        if name == "reranker":
            label = f"reranker, t = {result['rules']['percent_of_positive']:g}"
        rows.append([
            label, f"{100 * figures['kept_out']:.1f} %{goal}", str(figures["duplicates"]),
            f"{100 * figures['same_group'] / max(1, figures['negatives']):.1f} %",
            f"{100 * figures['dropped']:.1f} %", f"{100 * figures['without']:.1f} %",
        ])  # fmt: skip
    made = table(
        ["negatives", "duplicates kept out", "duplicates left in",
         "negatives that show the wanted thing", "candidates dropped",
         "queries without negatives"],
        rows,
    )  # fmt: skip
    made += (
        f"\n{result['duplicates']:,} of {result['documents']:,} documents are duplicates "
        f"({result['copies']}); {result['candidates']:,} of {result['pairs']:,} queries whose "
        "right document has one met it among their candidates; "
        f"{result['negatives']} negatives a query.\n"
    )
    if "quality" in result:
        own = result["quality"]
        rows = [["*the start*", *_pair(own["start"], spread=False)]]
        rows += [[ARMS[name], *_pair(figures)] for name, figures in own["arms"].items()]
        rows.append(
            ["filter, points (95 %)"]
            + [f"{_difference(own['difference'][m])[0]}: {own['difference'][m]['verdict']}"
               for m in ("hit@1", "mrr")]
        )  # fmt: skip
        made += table(["trained with", "hit@1", "MRR"], rows)
    return made + _footnote(result)


def builtin_training(result: Mapping[str, Any]) -> str:
    """Minutes of every stage, then hit@1 of what came out beside that of the shipped models."""
    rows = [
        [
            stage["name"],
            f"{stage['seconds'] / 60:.1f}",
            f"{100 * stage['seconds'] / result['seconds']:.0f} %",
        ]
        for stage in result["stages"]
    ]
    goal = _mark(result["seconds"] <= _GOAL_TRAIN_S)
    rows.append(["**all**", f"**{result['seconds'] / 60:.0f}**{goal}", ""])
    made = table(["stage", "minutes", "share"], rows)
    own, shipped = result["quality"], result.get("shipped")
    arms = list(next(iter(own["tasks"].values())))
    rows = [
        [task, *(f"{figures[arm]['hit@1']:.3f}" for arm in arms)]
        + [f"{shipped['tasks'][task][arm]['hit@1']:.3f}" for arm in arms if shipped]
        for task, figures in own["tasks"].items()
    ]
    head = [f"{BUILTIN_ARMS[arm]}, hit@1" for arm in arms]
    head += [f"shipped, {BUILTIN_ARMS[arm]}" for arm in arms if shipped]
    made += table(["query → document", *head], rows)
    kept = result["rounds_kept"]
    again = sum(stage["processes"] - 1 for stage in result["stages"])
    return made + (
        f"\nOf {len(kept)} rounds of mined negatives {sum(kept)} were kept. "
        + (f"Interruptions after which it went on: {again:g}. " if again else "")
        + (
            "Shipped: "
            + ", ".join(dict.fromkeys(f"`{m}`" for m in shipped["models"].values()))
            + "."
            if shipped
            else ""
        )
        + _footnote(result)
    )


def gradcache(result: Mapping[str, Any]) -> str:
    """Distance of gradients, then temporaries by global batch."""
    rows = [
        [
            name,
            str(f["sub_batches"]),
            f"{f['gradients_apart']:.1e}{_mark(f['gradients_apart'] <= _GOAL_GRADIENT)}",
            f"{f['largest_gradient']:.1e}",
            f"{f['loss_apart']:.1e}",
            f"{f['dropout_moves_the_loss_by']:.1e}",
        ]
        for name, f in result["gradients"].items()
    ]
    made = table(
        ["tuning", "sub-batches", "gradients apart, at most", "largest gradient", "losses apart",
         "loss with dropout less without"],
        rows,
    )  # fmt: skip
    rows = []
    for batch, f in result["memory"].items():
        most = max(f[name] for name in ("forward", "loss", "backward"))
        sizes = [f"{f[name] / 2**20:.1f}" for name in ("forward", "loss", "backward")]
        direct = f"{f['direct'] / 2**20:.0f}" if "direct" in f else "–"
        rows.append([batch, *sizes, f"**{most / 2**20:.1f}**", f"{f['vectors'] / 2**20:.1f}",
                     direct])  # fmt: skip
    made += table(
        ["global batch", "forward, MiB", "loss, MiB", "backward, MiB", "most", "vectors, MiB",
         "without GradCache, MiB"],
        rows,
    )  # fmt: skip
    return made + (
        f"\n`{result['model']}` in float32, LoRA, sub-batches of {result['sub_batch_tokens']} "
        f"tokens, temporaries as XLA reports them.{_footnote(result)}"
    )


def training(result: Mapping[str, Any]) -> str:
    """Seconds of a step, and how many times as fast as PyTorch's."""
    names = {"packed": "ours, packed", "padded": "ours, a row each", "torch": "PyTorch"}
    rows = []
    for name, label in names.items():
        ratio = result["ratio"].get(name)
        goal = _mark(ratio >= _GOAL_SPEED) if name == "packed" and ratio else ""
        rows.append([
            label, f"{result['seconds_per_step'][name]:.3f}",
            f"{result['examples_per_second'][name]:.1f}",
            f"{100 * result['pad_share'][name]:.0f} %",
            f"{ratio:.2f}{goal}" if ratio else "1",
        ])  # fmt: skip
    made = table(["step", "seconds", "pairs a second", "padding", "times as fast as PyTorch"], rows)
    return made + (
        f"\n{result['parameters'] / 1e6:.1f} million parameters, {result['pairs']} pairs, "
        f"{result['tokens']:,} tokens, torch {result['torch']}.{_footnote(result)}"
    )


def loop_kills(result: Mapping[str, Any]) -> str:
    """Kills by victim and phase, and whether anything differs."""
    rows = [[name, str(count)] for name, count in result["by_both"].items()]
    made = table(["killed", "times"], [*rows, ["all", str(result["kills"])]])
    verdict = (
        "Every round and every retriever was the same to the last bit, and no negative was lost or "
        "seen twice."
        if result["equal"]
        else f"**Different: {', '.join([*result['different'], *result['lost_or_twice']])}.**"
    )
    return made + (
        f"\n{result['runs_compared']} runs of {result['rounds']} rounds over "
        f"{result['examples']} examples were compared with one that nobody disturbed. "
        f"{verdict}{_footnote(result)}"
    )


def _pair(figures: Mapping[str, Any], *, spread: bool = True) -> list[str]:
    made = []
    for metric in ("hit@1", "mrr"):
        one = figures[metric]
        made.append(f"{one['mean']:.3f}" + (f" ± {one['spread']:.3f}" if spread else ""))
    return made


def _difference(figures: Mapping[str, Any]) -> list[str]:
    """[points with their interval, points by seed, verdict]."""
    whole = "{difference:+.1f} ({low:+.1f} to {high:+.1f})".format(
        **{k: 100 * figures[k] for k in ("difference", "low", "high")}
    )
    seeds = ", ".join(f"{100 * one:+.1f}" for one in figures["seeds"])
    return [whole, seeds, figures["verdict"]]


def _claim(name: str) -> str:
    return " over ".join(ARMS[part] for part in name.split(" over "))


def _mark(reached: bool) -> str:
    return " ✓" if reached else " (misses the goal)"


def _footnote(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    noisy = " **Other work ran on the machine meanwhile.**" if result["noisy"] else ""
    return (
        f"\n\n`{result['command']}`, {result['date']}, commit {result['commit']}, "
        f"{machine['cores']} cores ({machine['cpu']}), jax {result['versions']['jax']}.{noisy}\n"
    )
