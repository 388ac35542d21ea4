"""The durable truth: documents, their reasoning and their vectors (SQLite), and their media."""

from tte_jax.corpus.media import MediaStore, open_media
from tte_jax.corpus.store import (
    Change,
    CorpusProfile,
    CorpusStore,
    MediaRef,
    Removed,
    Stored,
    StoredDocument,
)

__all__ = [
    "Change",
    "CorpusProfile",
    "CorpusStore",
    "MediaRef",
    "MediaStore",
    "Removed",
    "Stored",
    "StoredDocument",
    "open_media",
]
