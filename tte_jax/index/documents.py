"""Stored documents with their media, whole or as far as a message holds them."""

from __future__ import annotations

from collections.abc import Sequence

from tte_jax.content import Content, Document, Media, Text
from tte_jax.corpus.media import MediaStore
from tte_jax.corpus.records import MediaRef, StoredDocument, validate_id
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import DataLossError, InvalidInputError
from tte_jax.index.reports import Fetched
from tte_jax.stages import StoredVersions


def fetch(
    store: CorpusStore,
    media: MediaStore,
    ids: Sequence[str],
    *,
    omit_media: bool = False,
    max_media_bytes: int | None = None,
) -> list[Fetched | None]:
    """The documents and what they were made of; `None` where the id is unknown.

    Args:
      ids: document ids.
      omit_media: leave media parts out and read no media file.
      max_media_bytes: refuse when the media together are larger.

    Raises:
      InvalidInputError: more media than `max_media_bytes` (`RESPONSE_TOO_LARGE`).
      DataLossError: a media file is missing or damaged.
    """
    for i, id in enumerate(ids):
        validate_id(id, f"ids[{i}]")
    rows = store.documents(ids)
    if max_media_bytes is not None and not omit_media:
        _limit_media([rows[id] for id in ids if id in rows], max_media_bytes)
    out: list[Fetched | None] = []
    for id in ids:
        row = rows.get(id)
        try:
            out.append(None if row is None else _fetched(row, media, omit_media))
        except DataLossError:
            # A delete or a replacement since the row was read takes its media along.
            now = store.documents([id]).get(id)
            if now is not None and row is not None and now.sequence == row.sequence:
                raise
            out.append(None if now is None else _fetched(now, media, omit_media))
    return out


def fitting(rows: Sequence[StoredDocument], limit: int) -> list[str]:
    """Ids of the first rows, at least one, whose texts and media have at most `limit` bytes."""
    ids: list[str] = []
    for row in rows:
        limit -= sum(p.size if isinstance(p, MediaRef) else 4 * len(p.text) for p in row.parts)
        limit -= 4 * len(row.reasoning.text) * 3
        if ids and limit < 0:
            break
        ids.append(row.id)
    return ids


def _fetched(row: StoredDocument, media: MediaStore, omit_media: bool) -> Fetched:
    parts = tuple(
        part if isinstance(part, Text) else Media(media.get(part.sha256), part.kind, part.page)
        for part in row.parts
        if isinstance(part, Text) or not omit_media
    )
    return Fetched(
        Document(row.id, Content(parts), row.metadata, row.reasoning, row.sequence),
        StoredVersions(row.content_hash, row.reasoner_version, row.embedder_version, row.metadata),
    )


def _limit_media(rows: Sequence[StoredDocument], limit: int) -> None:
    total = sum(part.size for row in rows for part in row.parts if isinstance(part, MediaRef))
    if total > limit:
        raise InvalidInputError(
            f"the media of these {len(rows)} documents have {total} bytes, more than the "
            f"{limit} that one answer holds. Ask for fewer ids, or leave the media out.",
            field="ids",
            reason="RESPONSE_TOO_LARGE",
        )
