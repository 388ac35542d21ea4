"""`tte corpus`: backup, restore, verify, migrate and re-embed."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tte_jax import cascade
from tte_jax.cli import connection, exits, options, state
from tte_jax.cli.output import Output
from tte_jax.cli.progress import bar
from tte_jax.client import RemoteEmbedder, RemoteIndex
from tte_jax.corpus import backup as backups
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import NotFoundError
from tte_jax.index import migration
from tte_jax.index.consistency import problems_at_rest

CORPUS = "corpus"

app = typer.Typer(
    name="corpus", no_args_is_help=True, help="Backup, restore, verify, move or re-embed a corpus."
)

BackupFolder = Annotated[Path, typer.Argument(help="Folder of the backup.", show_default=False)]


@app.command()
def backup(
    target: BackupFolder, data_dir: options.DataDir = None, json: options.Json = False
) -> None:
    """Copy the corpus to a new folder, also while it is served. Media on an object store stay
    there."""
    out = Output(json=json)
    made = backups.backup(_corpus(data_dir), target.absolute())
    _report(out, made, f"Backup in {target}")


@app.command()
def restore(
    source: BackupFolder, data_dir: options.DataDir = None, json: options.Json = False
) -> None:
    """Make a corpus from a backup, every file checked. There must be none in the data directory."""
    out = Output(json=json)
    corpus = _corpus(data_dir)
    _report(out, backups.restore(source.absolute(), corpus), f"Restored to {corpus}")


@app.command()
def verify(
    source: Annotated[
        Path | None,
        typer.Argument(help="A backup to verify instead of the corpus.", show_default=False),
    ] = None,
    media: Annotated[bool, typer.Option(help="Read every media file and check its hash.")] = True,
    data_dir: options.DataDir = None,
    timeout: options.Timeout = 3600.0,
    json: options.Json = False,
) -> None:
    """Check that nothing is lost or damaged. Exit code 1 and a list when something is.

    A corpus that is served is verified by its service, index included; another one from its files.
    """
    out = Output(json=json)
    folder = state.data_dir(data_dir)
    address = state.running_addresses(folder).get("index", "")
    if source is not None:
        backups.check_manifest(source.absolute())
        where, problems = source, problems_at_rest(source.absolute(), media=media, backup=True)
    elif address:
        problems, _ = connection.ask(
            "index", address, lambda index: index.verify(media=media, timeout_s=timeout)
        )
        where = f"the corpus served at {address}"
    else:
        where, problems = folder / CORPUS, problems_at_rest(folder / CORPUS, media=media)
    for problem in problems:
        out.err.print(problem, style="red", markup=False)
    if problems:
        out.show(f"{escape(str(where))}: {len(problems)} problems.")
    else:
        out.show(f"{escape(str(where))}: nothing is lost or damaged.")
    out.document(lambda: {"verified": str(where), "problems": problems})
    if problems:
        raise typer.Exit(exits.FAILED)


@app.command()
def migrate(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="Where to: scann, milvus://host:19530, or milvus:FILE (milvus-lite).",
            show_default=False,
        ),
    ],
    data_dir: options.DataDir = None,
    json: options.Json = False,
) -> None:
    """Move the corpus's index, while nothing serves the corpus. The documents stay where they are.

    Run it again after an interruption: it goes on from there. The corpus changes over only when
    every document has been compared.
    """
    out = Output(json=json)
    corpus = _corpus(data_dir)
    if not corpus.is_dir():
        raise NotFoundError(f"there is no corpus in {corpus}: nothing to migrate")
    with closing(CorpusStore.open(corpus)) as store, bar("Moving", store.count(), out) as advance:
        moved = migration.migrate(store, to, progress=lambda done, _: advance(done))
    if moved.source == moved.target:
        out.show(f"The index of {escape(str(corpus))} is {escape(moved.target)} already.")
    else:
        out.show(
            f"The index of {escape(str(corpus))} is {escape(moved.target)} now: "
            f"{moved.documents:,} documents, {moved.loaded:,} of them moved in this run."
        )
    out.document(lambda: vars(moved))


@app.command()
def reembed(
    embedder: Annotated[str, typer.Argument(help="The next embedder's service, host:port.")],
    index: Annotated[
        str,
        typer.Option(help="Index service, host:port. Default: that of the running system."),
    ] = "",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Documents in a call.")] = 16,
    instruction: options.Instruction = "",
    restart: Annotated[
        bool, typer.Option("--restart", help="Give up what was staged before.")
    ] = False,
    promote: Annotated[
        bool, typer.Option(help="Change over when every document has its vector.")
    ] = True,
    json: options.Json = False,
) -> None:
    """Give every document another embedder's vector beside serving, then change over in one step.

    ECRs are kept. Run it again after an interruption: it goes on from there.
    """
    out = Output(json=json)
    where = connection.checked(index) or connection.addresses()["index"]
    last = asyncio.run(
        _reembed(
            where, connection.checked(embedder), out,
            instruction=instruction, batch=batch, restart=restart, promote=promote,
        )
    )  # fmt: skip
    done = f"{last.staged:,} documents have vectors of {last.embedder_version}"
    if last.promoted:
        out.show(f"{done}, which serve since {last.promoted.seconds:.1f} s of preparation.")
    else:
        out.show(f"{done}, {last.pending:,} have none. They do not serve yet.")
    out.document(
        lambda: {
            "embedder_version": last.embedder_version,
            "staged": last.staged,
            "pending": last.pending,
            "promoted": last.promoted is not None,
        }
    )


async def _reembed(index: str, embedder: str, out: Output, **choice: Any) -> cascade.ReembedUpdate:
    stages = RemoteIndex(index), RemoteEmbedder(embedder)
    last = cascade.ReembedUpdate("", 0, 0)
    try:
        with bar("Embedding", None, out) as advance:
            async for last in cascade.reembed(*stages, **choice):
                advance(last.staged)
    finally:
        for stage in stages:
            await stage.close()
    return last


def _corpus(data_dir: Path | None) -> Path:
    return state.data_dir(data_dir) / CORPUS


def _report(out: Output, made: backups.Backup, what: str) -> None:
    media = f"media on {made.media_uri}" if made.media_uri else f"{made.media_files:,} media files"
    out.show(
        f"{escape(what)}: {made.documents:,} documents at sequence {made.sequence}, "
        f"{escape(media)} ({made.media_bytes:,} bytes)."
    )
    out.document(lambda: vars(made))
