"""Where a service is, and the one long-lived channel to it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import grpc

from tte_jax.client.retries import FIRST_PAUSE_S, LONGEST_PAUSE_S, MAX_ATTEMPTS
from tte_jax.limits import MAX_MESSAGE_BYTES

# Only UNAVAILABLE is tried again: nothing was done then, whereas an overloaded server asks to be
# left alone and a deadline that has passed stays passed. The throttle stops retries when most
# calls fail, so that a recovering server is not buried.
#
# Calls that answer with a stream are left out: when a draining server refuses one and closes the
# connection before the next attempt, gRPC 1.85 leaves the call hanging for ever, past its deadline.
# `client.retries` tries those again.
_STREAMS = (
    ("tte.v1.RetrievalService", "Search"),
    ("tte.v1.RetrievalService", "Ingest"),
    ("tte.v1.ReasonerService", "Reason"),
    ("tte.v1.RerankerService", "MineNegatives"),
)
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {"name": [{"service": service, "method": method} for service, method in _STREAMS]},
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": MAX_ATTEMPTS,
                "initialBackoff": f"{FIRST_PAUSE_S}s",
                "maxBackoff": f"{LONGEST_PAUSE_S}s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

OPTIONS = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    # As the servers have it: their own check names the field that is too large.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + 2**20),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + 2**20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own back-off grows to two minutes, long after a restarted server is ready again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True)
class Tls:
    """PEM files' contents. Without `roots` the system's certificate authorities are trusted;
    `chain` and `key` are the client's own, for mutual TLS."""

    roots: bytes | None = None
    chain: bytes | None = None
    key: bytes | None = None


@dataclass(frozen=True)
class Endpoint:
    """How to reach a service.

    Attributes:
      address: `host:port`, or any gRPC target (`dns:///…`, `unix:…`). A name that resolves to
        several addresses is balanced over all of them.
      tls: `None` = plain text.
      token: sent as `authorization: Bearer <token>`; empty = none.
    """

    address: str
    tls: Tls | None = None
    token: str = ""

    @classmethod
    def of(cls, endpoint: Endpoint | str) -> Endpoint:
        return cls(endpoint) if isinstance(endpoint, str) else endpoint

    @property
    def target(self) -> str:
        has_scheme = "://" in self.address or self.address.startswith(("unix:", "ipv4:", "ipv6:"))
        return self.address if has_scheme else f"dns:///{self.address}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def options(self) -> tuple[tuple[str, object], ...]:
        # A machine's HTTP proxy cannot reach the machine's own loopback.
        local = self.address.startswith(("localhost:", "127.", "[::1]:"))
        return (*OPTIONS, ("grpc.enable_http_proxy", 0)) if local else OPTIONS

    def open(self) -> grpc.Channel:
        """A channel for blocking calls. It connects with the first call."""
        if self.tls is None:
            return grpc.insecure_channel(self.target, options=self.options)
        return grpc.secure_channel(self.target, self._credentials(self.tls), options=self.options)

    def open_async(self) -> grpc.aio.Channel:
        """A channel for the running event loop. It connects with the first call."""
        if self.tls is None:
            return grpc.aio.insecure_channel(self.target, options=self.options)
        return grpc.aio.secure_channel(
            self.target, self._credentials(self.tls), options=self.options
        )

    @staticmethod
    def _credentials(tls: Tls) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(tls.roots, tls.key, tls.chain)
