"""The one place where errors become gRPC statuses.

| raised | code | details |
|---|---|---|
| any `TteError` | its own `code` | `ErrorInfo(reason, domain, metadata)` |
| `InvalidInputError` with a field | INVALID_ARGUMENT | and `BadRequest` with the field's path |
| `OverloadedError`, `UnavailableError` | RESOURCE_EXHAUSTED, UNAVAILABLE | and `RetryInfo` |
| `NotImplementedError` (an RPC without a handler) | UNIMPLEMENTED | `ErrorInfo` |
| anything else | INTERNAL | `ErrorInfo` with an incident number; the text stays in the log |

Cancellation is never turned into a status: it is re-raised, so that gRPC can free the call.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from servers.interception import guarded
from tte_jax.errors import InvalidInputError, OverloadedError, TteError, UnavailableError

log = logging.getLogger(__name__)

DOMAIN = "tte-jax"
DETAILS_KEY = "grpc-status-details-bin"
# Status travels in HTTP/2 trailers, of which peers accept about 8 KB. The message is there twice.
MAX_MESSAGE_CHARS = 1_000
MAX_METADATA_ITEMS = 16
MAX_METADATA_CHARS = 100


def to_status(error: Exception) -> status_pb2.Status:
    """The status of an error; for an unexpected one, logs it and keeps its text back."""
    if isinstance(error, TteError):
        return _status(
            grpc.StatusCode[error.code], error.message, error.reason, error.metadata, _extra(error)
        )
    if isinstance(error, NotImplementedError):
        return _status(
            grpc.StatusCode.UNIMPLEMENTED, "this server does not offer this RPC", "UNIMPLEMENTED"
        )
    incident = secrets.token_hex(4)
    log.error("incident %s", incident, exc_info=error)
    return _status(
        grpc.StatusCode.INTERNAL,
        f"internal error; the server's log has it as incident {incident}",
        "INTERNAL",
        {"incident": incident},
    )


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """Ends the RPC with the error's status. Always raises `grpc.aio.AbortError`."""
    status = to_status(error)
    code = next(c for c in grpc.StatusCode if c.value[0] == status.code)
    await context.abort(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Runs every handler so that what it raises ends as the status of this table."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        return guarded(handler, _translate) if handler is not None else handler


@asynccontextmanager
async def _translate(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise  # a status was set already
    except Exception as error:  # CancelledError is a BaseException and passes through
        await abort(context, error)


def _extra(error: TteError) -> list[Message]:
    if isinstance(error, InvalidInputError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message[:MAX_MESSAGE_CHARS]
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if isinstance(error, OverloadedError | UnavailableError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]
    return []


def _status(
    code: grpc.StatusCode,
    message: str,
    reason: str,
    metadata: dict[str, str] | None = None,
    details: list[Message] | None = None,
) -> status_pb2.Status:
    kept = list((metadata or {}).items())[:MAX_METADATA_ITEMS]
    info = error_details_pb2.ErrorInfo(
        reason=reason,
        domain=DOMAIN,
        metadata={k[:MAX_METADATA_CHARS]: v[:MAX_METADATA_CHARS] for k, v in kept},
    )
    status = status_pb2.Status(code=code.value[0], message=message[:MAX_MESSAGE_CHARS])
    for detail in [info, *(details or [])]:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
