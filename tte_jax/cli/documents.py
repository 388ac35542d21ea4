"""`tte get` and `tte delete`: single documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tte_jax.cli import exits, options, views
from tte_jax.cli.connection import connect
from tte_jax.cli.output import Output
from tte_jax.content import Document, MediaKind
from tte_jax.errors import InvalidInputError

# By the kind of media, since AVI and WebP begin alike: (where, what stands there, suffix).
_MAGIC = {
    MediaKind.IMAGE: (
        (0, b"\x89PNG", ".png"),
        (0, b"\xff\xd8\xff", ".jpg"),
        (8, b"WEBP", ".webp"),
        (0, b"GIF8", ".gif"),
        (0, b"BM", ".bmp"),
        (0, b"II*\x00", ".tif"),
        (0, b"MM\x00*", ".tif"),
    ),
    MediaKind.VIDEO: (
        (4, b"ftypqt", ".mov"),
        (4, b"ftyp", ".mp4"),
        (0, b"\x1aE\xdf\xa3", ".mkv"),
        (8, b"AVI ", ".avi"),
    ),
    MediaKind.PAGE: ((0, b"%PDF", ".pdf"),),
}


def get(
    id: Annotated[str, typer.Argument(help="Document id.")],
    save: Annotated[
        Path | None, typer.Option(help="Write the document's media into this folder.")
    ] = None,
    timeout: options.Timeout = 30.0,
    address: options.Address = "",
    json: options.Json = False,
) -> None:
    """Show one document: its metadata, its ECR and what it holds."""
    out = Output(json=json)
    with connect(address) as client:
        document = client.get_document(id, timeout_s=timeout)
    saved = _save(document, save) if save else []
    table = Table(show_header=False, title=escape(document.id), title_justify="left")
    for key, value in sorted(document.metadata.items()):
        table.add_row(escape(key), escape(str(value)))
    if document.content.text:
        table.add_row("text", escape(document.content.text))
    for media in document.content.media:
        table.add_row(media.kind.value, f"{len(media.data):,} bytes, sha256 {media.sha256[:16]}…")
    table.add_row("ECR", escape(views.ecr_line(document.reasoning) or "(none)"))
    table.add_row("sequence", str(document.sequence))
    out.show(table)
    for path in saved:
        out.show(f"saved {escape(str(path))}")
    out.document(
        lambda: {
            "id": document.id,
            "metadata": dict(document.metadata),
            "text": document.content.text,
            "media": [
                {"kind": m.kind.value, "bytes": len(m.data), "sha256": m.sha256}
                for m in document.content.media
            ],
            "reasoning": views.reasoning_json(document.reasoning),
            "sequence": document.sequence,
            "saved": [str(path) for path in saved],
        }
    )


def delete(
    ids: Annotated[list[str], typer.Argument(help="Document ids.")],
    timeout: options.Timeout = 30.0,
    address: options.Address = "",
    json: options.Json = False,
) -> None:
    """Delete documents. Ids that do not exist are reported; the exit code is then 3."""
    out = Output(json=json)
    with connect(address) as client:
        deleted, unknown = client.delete_documents(ids, timeout_s=timeout)
    out.show(f"{len(deleted)} deleted, {len(unknown)} unknown.")
    for id in unknown:
        out.err.print(f"There is no document {id!r}.", markup=False)
    out.document(lambda: {"deleted": list(deleted), "unknown": list(unknown)})
    if unknown:
        raise typer.Exit(exits.NOT_FOUND)


def _save(document: Document, folder: Path) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _written(document, folder)
    except OSError as error:
        raise InvalidInputError(
            f"--save {folder}: {error.strerror or error}; give a folder that can be written to.",
            field="--save",
        ) from None


def _written(document: Document, folder: Path) -> list[Path]:
    # An id may hold anything, path separators included.
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in document.id).strip(".") or "_"
    saved: list[Path] = []
    for number, media in enumerate(document.content.media):
        known = _MAGIC[media.kind]
        suffix = next((s for at, magic, s in known if media.data.startswith(magic, at)), ".bin")
        path = folder / f"{stem}{f'-{number}' if number else ''}{suffix}"
        path.write_bytes(media.data)
        saved.append(path)
    return saved
