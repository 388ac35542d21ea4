"""Is a corpus whole? What the database can be asked about itself and its media."""

from __future__ import annotations

from collections.abc import Iterator

from tte_jax.content import content_hash
from tte_jax.corpus.media import MediaStore
from tte_jax.corpus.records import MediaRef, Stored, check_vector
from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import DataLossError, InvalidInputError

_PER_READ = 500


def database_problems(store: CorpusStore) -> Iterator[str]:
    """What is wrong inside the database: damaged pages, vectors that do not fit together, content
    that is not what its hash says, media that are not accounted for, numbers given out twice."""
    for line in store.integrity():
        yield f"database: {line}"
    profiles = store.profiles()
    if len(profiles) > 1:
        mixed = ", ".join(f"{count} of {p.embedder_version!r} ({p.dimension})"
                          for p, count in profiles.items())  # fmt: skip
        yield f"database: vectors that cannot be compared stand side by side: {mixed}"
    newest = store.sequence
    sequences: set[int] = set()
    try:
        for change in store.changes_since(0):
            if change.sequence > newest or change.sequence in sequences:
                yield f"document {change.id!r} has sequence {change.sequence}, which is not its own"
            sequences.add(change.sequence)
            if isinstance(change, Stored):
                try:
                    check_vector(change.vector, f"document {change.id!r}: vector")
                except InvalidInputError as exc:
                    yield exc.message
    except DataLossError as exc:
        yield exc.message
    ids = store.ids()
    for start in range(0, len(ids), _PER_READ):
        some = ids[start : start + _PER_READ]
        named = store.media_by_document(some)
        for id, document in store.documents(some).items():
            parts = document.parts
            if content_hash(parts) != document.content_hash:
                yield f"document {id!r} has other content than its hash says"
            if {p.sha256 for p in parts if isinstance(p, MediaRef)} != named.get(id, set()):
                yield f"document {id!r} has media that are not accounted for"


def media_problems(store: CorpusStore, media: MediaStore) -> Iterator[str]:
    """Media that a document names and that are missing or damaged; reads every file."""
    for sha256 in sorted(store.all_media()):
        try:
            media.get(sha256)
        except DataLossError as exc:
            yield exc.message
