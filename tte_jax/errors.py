"""Every error that a caller can meet. Each type stands for exactly one gRPC code.

`servers.errors` turns these into `google.rpc.Status` with details; `tte_jax.client` turns the
status back into the same types. A message names the thing, what was expected, what came, and what
to do; `reason` is a stable UPPER_SNAKE_CASE word for programs.
"""

from __future__ import annotations


class TteError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
      reason: stable machine-readable word (`ErrorInfo.reason`).
      metadata: values of the message, for programs (`ErrorInfo.metadata`).
    """

    code = "INTERNAL"
    default_reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = {k: str(v) for k, v in metadata.items()}


class InvalidInputError(TteError):
    """The request itself is wrong; sending it again cannot help.

    Attributes:
      field: path of the field at fault, such as `query.parts[0].image.data`.
    """

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_INPUT"

    def __init__(
        self, message: str, *, field: str = "", reason: str = "", **metadata: object
    ) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.field = field


class AccessError(TteError):
    """The caller's token is missing or wrong, or does not allow this."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class NotFoundError(TteError):
    """A document, model directory or file that does not exist."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class PreconditionError(TteError):
    """The system's state forbids it, e.g. vectors of another dimension or embedder version."""

    code = "FAILED_PRECONDITION"
    default_reason = "PRECONDITION"


class OverloadedError(TteError):
    """A bounded queue is full. Try again after `retry_after_s` seconds."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "OVERLOADED"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, reason: str = "", **metadata: object
    ) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.retry_after_s = retry_after_s


class StorageFullError(TteError):
    """No disk space is left; retrying does not help until an operator acts."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "INSUFFICIENT_STORAGE"


class UnavailableError(TteError):
    """Warming up, draining, or a stage is down. Try again after `retry_after_s` seconds."""

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, reason: str = "", **metadata: object
    ) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(TteError):
    """The deadline passed, or too little of it is left to begin."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class DataLossError(TteError):
    """Stored data fails its checksum or cannot be read back."""

    code = "DATA_LOSS"
    default_reason = "DATA_LOSS"


class InternalError(TteError):
    """A defect of ours, or a model that produced NaN. The message holds no internals."""

    code = "INTERNAL"
    default_reason = "INTERNAL"


class UnsupportedError(TteError):
    """A valid request that this deployment cannot serve, e.g. a model without a vision tower."""

    code = "UNIMPLEMENTED"
    default_reason = "UNSUPPORTED"
