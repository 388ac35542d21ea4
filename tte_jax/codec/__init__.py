"""The vocabulary of `tte_jax` to and from the messages of `tte.v1`; client and servers share it.

`encode_*` makes a message of a value, `decode_*` a value of a message. Decoders check the limits
of `tte_jax.limits` and raise `InvalidInputError` with the path of the field at fault, which starts
with the `at` that the caller gives. All are pure functions. Searches and ingests are in
`tte_jax.codec.search`.
"""

from tte_jax.codec.contents import (
    check_id,
    check_text,
    decode_content,
    decode_reasoning,
    encode_content,
    encode_reasoning,
    text_only,
)
from tte_jax.codec.documents import (
    decode_document,
    decode_entry,
    decode_hit,
    decode_vector,
    decode_vectors,
    encode_bare_hits,
    encode_document,
    encode_entry,
    encode_hit,
    encode_vector,
)
from tte_jax.codec.metadata import decode_filter, decode_metadata, encode_filter, encode_metadata
from tte_jax.codec.stages import (
    decode_budget,
    decode_embed_item,
    decode_embedding,
    decode_reason_item,
    decode_sampling,
    decode_usage,
    encode_budget,
    encode_embed_item,
    encode_embedding,
    encode_reason_item,
    encode_sampling,
    encode_usage,
)

__all__ = [
    "check_id",
    "check_text",
    "decode_budget",
    "decode_content",
    "decode_document",
    "decode_embed_item",
    "decode_embedding",
    "decode_entry",
    "decode_filter",
    "decode_hit",
    "decode_metadata",
    "decode_reason_item",
    "decode_reasoning",
    "decode_sampling",
    "decode_usage",
    "decode_vector",
    "decode_vectors",
    "encode_bare_hits",
    "encode_budget",
    "encode_content",
    "encode_document",
    "encode_embed_item",
    "encode_embedding",
    "encode_entry",
    "encode_filter",
    "encode_hit",
    "encode_metadata",
    "encode_reason_item",
    "encode_reasoning",
    "encode_sampling",
    "encode_usage",
    "encode_vector",
    "text_only",
]
