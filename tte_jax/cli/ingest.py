"""`tte ingest`: images, videos, PDFs and JSONL manifests into the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tte_jax.cascade.messages import IngestOptions, IngestUpdate, ItemState
from tte_jax.cli import exits, options, sources
from tte_jax.cli.connection import Client, connect
from tte_jax.cli.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from tte_jax.cli.output import Output
from tte_jax.cli.parsing import parse_pair
from tte_jax.cli.progress import bar
from tte_jax.content import Document, Metadata
from tte_jax.errors import InvalidInputError


def ingest(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Images, videos, PDFs (a document a page), folders of them, or .jsonl manifests "
            'with {"id", "text", "image" or "images", "video", "pdf", "page", "metadata"} per line.'
        ),
    ],
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata",
            "-m",
            help='field=value for every document, or a JSON file {"file name": {"field": value}}.',
        ),
    ] = None,
    id_prefix: Annotated[
        str, typer.Option(help="Put before every id; an id is the path below the given folder.")
    ] = "",
    reasoning_tokens: Annotated[
        int, typer.Option(min=0, help="New tokens for each document's ECR; 0 = without.")
    ] = IngestOptions.reasoning_tokens,
    instruction: options.Instruction = "",
    address: options.Address = "",
    json: options.Json = False,
) -> None:
    """Store documents. Run it again after an interruption: what is stored already is skipped.

    Bad files do not stop the rest; they are listed at the end, and the exit code is 1.
    """
    out = Output(json=json)
    rules = metadata_rules(metadata or [])
    unreadable: list[sources.BadSource] = []
    files, others = sources.find(paths, unreadable)
    if not files:
        raise InvalidInputError(
            f"{', '.join(map(str, paths))}: no image, video, PDF or .jsonl manifest in there "
            f"({others} other files, {len(unreadable)} folders that cannot be read).",
            reason="NOTHING_TO_INGEST",
        )
    run = Run(files, rules, id_prefix)
    run.bad += unreadable
    choice = IngestOptions(reasoning_tokens=reasoning_tokens, instruction=instruction)
    with connect(address) as client:
        last = run.send(client, choice, out)
    if others:
        out.note(f"{others} files of other kinds were left out.")
    _report(run, last, out)
    if run.bad:
        raise typer.Exit(exits.FAILED)


def metadata_rules(given: list[str]) -> sources.MetadataRules:
    """`--metadata` values: pairs are shared by all documents, files give them one by one."""
    shared: dict[str, Any] = {}
    by_file: dict[str, Metadata] = {}
    for value in given:
        if "=" in value and not _is_file(value):
            key, typed = parse_pair(value, flag="--metadata")
            shared[key] = typed
        else:
            by_file.update(sources.read_metadata_file(Path(value)))
    return sources.MetadataRules(shared, by_file)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return False


class Run:
    """One ingest: what is sent, and what turned out bad.

    Attributes:
      bad: files that did not become documents, with the reason.
      duplicates: copies of documents sent before, left out.
    """

    def __init__(
        self, files: list[tuple[Path, str]], rules: sources.MetadataRules, prefix: str
    ) -> None:
        self.files = files
        self.rules = rules
        self.prefix = prefix
        self.bad: list[sources.BadSource] = []
        self.duplicates = 0
        self._source_of: dict[str, str] = {}

    def documents(self) -> Iterator[Document]:
        items = sources.read(self.files, self.rules, prefix=self.prefix)
        for item in sources.without_duplicates(items):
            if item is None:
                self.duplicates += 1
            elif isinstance(item, sources.BadSource):
                self.bad.append(item)
            else:
                self._source_of[item.document.id] = item.source
                yield item.document

    def send(self, client: Client, choice: IngestOptions, out: Output) -> IngestUpdate:
        last = IngestUpdate(results=(), received=0, stored=0, skipped=0, failed=0)
        # A manifest or a PDF holds any number of documents.
        single = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        plain = all(path.suffix.lower() in single for path, _ in self.files)
        try:
            with bar("Ingesting", len(self.files) if plain else None, out) as advance:
                for last in client.ingest(self.documents(), choice):
                    self.note_failures(last)
                    advance(last.stored + last.skipped + len(self.bad) + self.duplicates)
        except BaseException:
            kept = last.stored + last.skipped
            out.note(
                f"{kept} documents are stored. Run the same command again to go on from there."
            )
            raise
        return last

    def note_failures(self, update: IngestUpdate) -> None:
        for result in update.results:
            if result.state is ItemState.FAILED:
                why = result.error.message if result.error else "unknown"
                source = self._source_of.get(result.id, result.id)
                self.bad.append(sources.BadSource(source, why))


def _report(run: Run, last: IngestUpdate, out: Output) -> None:
    out.show(
        f"{last.stored} stored, {last.skipped} unchanged, {run.duplicates} duplicates left out, "
        f"{len(run.bad)} bad."
    )
    for bad in run.bad:
        out.err.print(f"{bad.source}: {bad.message}", style="red", markup=False)
    out.document(
        lambda: {
            "stored": last.stored,
            "unchanged": last.skipped,
            "duplicates": run.duplicates,
            "sequence": last.sequence,
            "bad": [{"source": b.source, "message": b.message} for b in run.bad],
        }
    )
