"""Vectors, documents, index entries and hits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tte.v1 import document_pb2, index_pb2, vector_pb2
from tte_jax import limits
from tte_jax.codec.contents import (
    check_id,
    decode_content,
    decode_reasoning,
    encode_content,
    encode_reasoning,
    text_only,
)
from tte_jax.codec.metadata import decode_metadata, encode_metadata
from tte_jax.content import Document
from tte_jax.errors import InvalidInputError
from tte_jax.stages import Hit, IndexEntry

_NUMPY = {vector_pb2.DTYPE_FLOAT32: np.dtype("<f4"), vector_pb2.DTYPE_FLOAT16: np.dtype("<f2")}


def encode_vector(vector: np.ndarray) -> vector_pb2.Vector:
    """[D] of any float type as little-endian float32."""
    if vector.ndim != 1:
        raise InvalidInputError(f"a vector has shape [D], not {list(vector.shape)}")
    return vector_pb2.Vector(
        data=np.ascontiguousarray(vector, dtype="<f4").tobytes(),
        dtype=vector_pb2.DTYPE_FLOAT32,
        dimension=vector.shape[0],
    )


def decode_vector(message: vector_pb2.Vector, at: str) -> np.ndarray:
    """[D] float32 of its own (writable). Raises InvalidInputError unless complete and finite."""
    dtype = _NUMPY.get(message.dtype)
    if dtype is None:
        raise InvalidInputError(
            f"{at}.dtype is {message.dtype}: expected DTYPE_FLOAT32 or DTYPE_FLOAT16",
            field=f"{at}.dtype",
        )
    if not 1 <= message.dimension <= limits.MAX_DIMENSION:
        raise InvalidInputError(
            f"{at}.dimension is {message.dimension}: expected 1 to {limits.MAX_DIMENSION}",
            field=f"{at}.dimension",
            limit=limits.MAX_DIMENSION,
        )
    expected = message.dimension * dtype.itemsize
    if len(message.data) != expected:
        raise InvalidInputError(
            f"{at}.data has {len(message.data)} bytes: {message.dimension} elements of "
            f"{dtype.itemsize} bytes are {expected}",
            field=f"{at}.data",
        )
    vector = np.frombuffer(message.data, dtype).astype(np.float32)
    if not np.isfinite(vector).all():
        raise InvalidInputError(f"{at}.data has elements that are not finite", field=f"{at}.data")
    return vector


def decode_vectors(messages: Sequence[vector_pb2.Vector], at: str) -> np.ndarray:
    """[Q, D] float32 of Q ≥ 1 vectors of one dimension, at a tenth of the cost of one by one.

    Raises InvalidInputError as `decode_vector`, and when the dimensions differ.
    """
    first = messages[0]
    for i, message in enumerate(messages):
        if message.dimension != first.dimension:
            raise InvalidInputError(
                f"{at}[{i}] has dimension {message.dimension}, {at}[0] has {first.dimension}: "
                "vectors of one batch have one dimension",
                field=f"{at}[{i}].dimension",
            )
    size = 4 * first.dimension
    if 1 <= first.dimension <= limits.MAX_DIMENSION and all(
        m.dtype == vector_pb2.DTYPE_FLOAT32 and len(m.data) == size for m in messages
    ):
        joined = np.frombuffer(b"".join([m.data for m in messages]), "<f4")
        vectors = joined.astype(np.float32).reshape(len(messages), first.dimension)
        if np.isfinite(vectors).all():
            return vectors
    return np.stack([decode_vector(m, f"{at}[{i}]") for i, m in enumerate(messages)])


def encode_document(document: Document, *, omit_media: bool = False) -> document_pb2.Document:
    content = text_only(document.content) if omit_media else document.content
    return document_pb2.Document(
        id=document.id,
        content=encode_content(content),
        metadata=encode_metadata(document.metadata),
        reasoning=encode_reasoning(document.reasoning),
        sequence=document.sequence,
    )


def decode_document(
    message: document_pb2.Document, at: str, *, allow_empty: bool = False
) -> Document:
    """Raises InvalidInputError; `allow_empty` accepts a document whose media were left out."""
    return Document(
        id=check_id(message.id, f"{at}.id"),
        content=decode_content(message.content, f"{at}.content", allow_empty=allow_empty),
        metadata=decode_metadata(message.metadata, f"{at}.metadata"),
        reasoning=decode_reasoning(message.reasoning),
        sequence=message.sequence,
    )


def encode_entry(entry: IndexEntry) -> index_pb2.IndexEntry:
    return index_pb2.IndexEntry(
        document=encode_document(entry.document),
        vector=encode_vector(entry.vector),
        reasoner_version=entry.reasoner_version,
        embedder_version=entry.embedder_version,
    )


def decode_entry(message: index_pb2.IndexEntry, at: str) -> IndexEntry:
    """Raises InvalidInputError."""
    return IndexEntry(
        document=decode_document(message.document, f"{at}.document"),
        vector=decode_vector(message.vector, f"{at}.vector"),
        reasoner_version=message.reasoner_version,
        embedder_version=message.embedder_version,
    )


def encode_hit(hit: Hit) -> index_pb2.Hit:
    return index_pb2.Hit(
        id=hit.id,
        cosine=hit.cosine,
        reasoning=encode_reasoning(hit.reasoning),
        metadata=encode_metadata(hit.metadata),
    )


def encode_bare_hits(hits: Iterable[Hit], result: index_pb2.SearchBatchResult) -> None:
    """Adds ids and cosines only to `result`, where they lie: a third of the cost of new messages,
    which would be copied there."""
    add = result.hits.add
    for hit in hits:
        message = add()
        message.id = hit.id
        message.cosine = hit.cosine


def decode_hit(message: index_pb2.Hit) -> Hit:
    """`cosine` has float32 precision."""
    return Hit(
        id=message.id,
        cosine=message.cosine,
        reasoning=decode_reasoning(message.reasoning),
        metadata=decode_metadata(message.metadata, "hit.metadata"),
    )
