"""Asks the five services how they are: health, model, counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tte.v1 import (
    embedder_pb2,
    embedder_pb2_grpc,
    index_pb2,
    index_pb2_grpc,
    reasoner_pb2,
    reasoner_pb2_grpc,
    reranker_pb2,
    reranker_pb2_grpc,
)
from tte_jax.client import Endpoint

SERVICES = {
    "gateway": "tte.v1.RetrievalService",
    "reasoner": "tte.v1.ReasonerService",
    "embedder": "tte.v1.EmbedderService",
    "reranker": "tte.v1.RerankerService",
    "index": "tte.v1.IndexService",
}
SERVING, UNREACHABLE = "SERVING", "UNREACHABLE"


@dataclass(frozen=True)
class Seen:
    """One service as it was found.

    Attributes:
      health: SERVING, NOT_SERVING, SERVICE_UNKNOWN or UNREACHABLE.
      about: its own account (`ModelInfo` or `StatsResponse`, field names as in the proto); empty
        when it gave none.
    """

    service: str
    address: str
    health: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def look(addresses: Mapping[str, str], *, timeout_s: float = 2.0) -> list[Seen]:
    """Every service in the order of `SERVICES` that has an address."""
    return [
        _look_at(service, addresses[service], timeout_s)
        for service in SERVICES
        if service in addresses
    ]


def _look_at(service: str, address: str, timeout_s: float) -> Seen:
    endpoint = Endpoint(address)
    with endpoint.open() as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICES[service])
            answer = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            unknown = code is grpc.StatusCode.NOT_FOUND
            return Seen(service, address, "SERVICE_UNKNOWN" if unknown else UNREACHABLE)
        health = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        try:
            about = _about(service, channel, timeout_s)
        except grpc.RpcError:
            about = {}
    return Seen(service, address, health, about)


def _about(service: str, channel: grpc.Channel, timeout_s: float) -> dict[str, Any]:
    if service == "reasoner":
        stub = reasoner_pb2_grpc.ReasonerServiceStub(channel)
        request = reasoner_pb2.ReasonerServiceInfoRequest()
        message: Any = stub.Info(request, timeout=timeout_s).model
    elif service == "embedder":
        stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
        request = embedder_pb2.EmbedderServiceInfoRequest()
        message = stub.Info(request, timeout=timeout_s).model
    elif service == "reranker":
        stub = reranker_pb2_grpc.RerankerServiceStub(channel)
        request = reranker_pb2.RerankerServiceInfoRequest()
        message = stub.Info(request, timeout=timeout_s).model
    elif service == "index":
        stub = index_pb2_grpc.IndexServiceStub(channel)
        message = stub.Stats(index_pb2.StatsRequest(), timeout=timeout_s)
    else:
        return {}
    # 64-bit numbers are texts in protobuf's JSON; nobody wants to compare those.
    shown = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    numbers = {f.name for f in message.DESCRIPTOR.fields if f.cpp_type in (2, 4)}
    return {k: int(v) if k in numbers else v for k, v in shown.items()}
