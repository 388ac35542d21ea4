"""gRPC statuses turned back into the types of `tte_jax.errors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from tte_jax.errors import (
    AccessError,
    DataLossError,
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    StorageFullError,
    TteError,
    UnavailableError,
    UnsupportedError,
)

_DETAILS_KEY = "grpc-status-details-bin"
_PLAIN: dict[str, type[TteError]] = {
    "NOT_FOUND": NotFoundError,
    "FAILED_PRECONDITION": PreconditionError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "DATA_LOSS": DataLossError,
    "INTERNAL": InternalError,
    "UNIMPLEMENTED": UnsupportedError,
    "UNAUTHENTICATED": AccessError,
    "PERMISSION_DENIED": AccessError,
}


def make_error(
    code: str,
    message: str,
    *,
    reason: str = "",
    field: str = "",
    retry_after_s: float = 1.0,
    metadata: dict[str, str] | None = None,
) -> TteError:
    """The error that a gRPC code's name and its details stand for."""
    if code in ("INVALID_ARGUMENT", "OUT_OF_RANGE"):
        error: TteError = InvalidInputError(message, field=field, reason=reason)
    elif code == "RESOURCE_EXHAUSTED" and reason == StorageFullError.default_reason:
        error = StorageFullError(message, reason=reason)
    elif code == "RESOURCE_EXHAUSTED":
        error = OverloadedError(message, retry_after_s=retry_after_s, reason=reason)
    elif code == "UNAVAILABLE":
        error = UnavailableError(message, retry_after_s=retry_after_s, reason=reason)
    else:
        error = _PLAIN.get(code, InternalError)(message, reason=reason)
    error.metadata = dict(metadata or {})
    return error


def from_rpc_error(error: grpc.RpcError, peer: str) -> TteError:
    """The error behind a failed call.

    Args:
      error: of a blocking or an asyncio call.
      peer: service and address, for messages where the server sent none of its own.
    """
    code = error.code().name if hasattr(error, "code") else "UNKNOWN"
    status = _details(error)
    if status is None:
        return _without_details(code, error.details() or "", peer)
    reason, field, retry_after_s, metadata = "", "", 1.0, {}
    for packed in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif packed.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif packed.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return make_error(
        code,
        status.message,
        reason=reason,
        field=field,
        retry_after_s=retry_after_s,
        metadata=metadata,
    )


@contextmanager
def translated(peer: str) -> Iterator[None]:
    """Raises `tte_jax.errors` types for the gRPC errors raised inside. Cancellation passes."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer) from None


def _details(error: grpc.RpcError) -> status_pb2.Status | None:
    trailers: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in trailers or ():
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _without_details(code: str, text: str, peer: str) -> TteError:
    """gRPC itself, or a proxy, ended the call; its own words say little to a person."""
    if code == "UNAVAILABLE":
        return UnavailableError(f"{peer} cannot be reached; is it running?", reason="UNREACHABLE")
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceededError(f"{peer} did not answer in time; allow more time")
    # grpc.aio's words where a read or write of its own failed: the connection went away under it.
    if code == "CANCELLED" or (code == "INTERNAL" and text == "Internal error from Core"):
        return UnavailableError(f"{peer} broke the call off; try again", reason="CANCELLED")
    if code == "RESOURCE_EXHAUSTED" and "message larger than max" in text:
        return InvalidInputError(
            f"the message to or from {peer} is too large ({text}); send fewer or smaller items",
            reason="MESSAGE_TOO_LARGE",
        )
    if code == "UNIMPLEMENTED":
        return UnsupportedError(f"{peer} does not offer this call; is the address right?")
    return make_error(code, f"{peer} failed with {code}" + (f": {text}" if text else ""))
