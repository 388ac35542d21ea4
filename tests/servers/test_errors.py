"""The table of `servers.errors` covers every type of `tte_jax.errors`."""

from __future__ import annotations

import asyncio
import inspect

import grpc
import pytest
from google.rpc import error_details_pb2

from servers.errors import DETAILS_KEY, MAX_METADATA_CHARS, abort, to_status
from tte_jax import errors

TYPES = [
    t
    for _, t in inspect.getmembers(errors, inspect.isclass)
    if issubclass(t, errors.TteError) and t is not errors.TteError
]

# Written out by hand: the code is part of the API, so a changed one must fail here.
EXPECTED = {
    "InvalidInputError": ("INVALID_ARGUMENT", ["ErrorInfo", "BadRequest"]),
    "NotFoundError": ("NOT_FOUND", ["ErrorInfo"]),
    "AccessError": ("UNAUTHENTICATED", ["ErrorInfo"]),
    "PreconditionError": ("FAILED_PRECONDITION", ["ErrorInfo"]),
    "OverloadedError": ("RESOURCE_EXHAUSTED", ["ErrorInfo", "RetryInfo"]),
    "StorageFullError": ("RESOURCE_EXHAUSTED", ["ErrorInfo"]),
    "UnavailableError": ("UNAVAILABLE", ["ErrorInfo", "RetryInfo"]),
    "DeadlineExceededError": ("DEADLINE_EXCEEDED", ["ErrorInfo"]),
    "DataLossError": ("DATA_LOSS", ["ErrorInfo"]),
    "InternalError": ("INTERNAL", ["ErrorInfo"]),
    "UnsupportedError": ("UNIMPLEMENTED", ["ErrorInfo"]),
}


def kinds(status) -> list[str]:
    return [d.TypeName().rpartition(".")[2] for d in status.details]


def info(status) -> error_details_pb2.ErrorInfo:
    found = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(found)
    return found


def test_the_table_knows_every_error() -> None:
    assert {t.__name__ for t in TYPES} == set(EXPECTED)


@pytest.mark.parametrize("kind", TYPES)
def test_each_error_has_its_code_and_details(kind: type[errors.TteError]) -> None:
    error = kind("the thing is wrong", what=3)
    if isinstance(error, errors.InvalidInputError):
        error.field = "query.parts[0].image"
    status = to_status(error)
    code, details = EXPECTED[kind.__name__]
    assert grpc.StatusCode[code].value[0] == status.code
    assert kinds(status) == details
    assert status.message == "the thing is wrong"
    assert info(status).reason == error.reason and info(status).domain == "tte-jax"
    assert dict(info(status).metadata) == {"what": "3"}


def test_retry_info_carries_the_delay() -> None:
    status = to_status(errors.UnavailableError("down", retry_after_s=2.5))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry) and retry.retry_delay.ToMilliseconds() == 2500


@pytest.mark.parametrize(
    "error", [ValueError("secret"), KeyError("secret"), TimeoutError("secret")]
)
def test_unexpected_errors_keep_their_text(error: Exception, caplog) -> None:
    status = to_status(error)
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in str(status)
    assert info(status).metadata["incident"] in caplog.text and "secret" in caplog.text


def test_a_status_fits_into_trailers() -> None:
    # Peers refuse trailers of more than about 8 KB, and the client would see no details at all.
    huge = errors.InvalidInputError(
        "x" * 10**5, field="f", **{f"k{i}": "v" * 999 for i in range(99)}
    )
    status = to_status(huge)
    assert len(status.SerializeToString()) + len(status.message) < 8_000
    assert max(map(len, info(status).metadata.values())) == MAX_METADATA_CHARS


async def test_abort_sends_the_status_in_the_standard_trailer() -> None:
    class Context:
        sent: tuple = ()

        async def abort(self, code, details, trailing_metadata):
            self.sent = (code, details, dict(trailing_metadata))

    context = Context()
    error = errors.NotFoundError("no document 'x'")
    await abort(context, error)  # type: ignore[arg-type]
    code, details, trailers = context.sent
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "no document 'x'")
    assert trailers == {DETAILS_KEY: to_status(error).SerializeToString()}


async def test_cancellation_is_not_an_error() -> None:
    from servers.errors import _translate

    with pytest.raises(asyncio.CancelledError):
        async with _translate(None):  # type: ignore[arg-type]
            raise asyncio.CancelledError
