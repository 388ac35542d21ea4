"""Clients: the user's (`Client`, `AsyncClient`), and the four stages over gRPC for the gateway."""

from tte_jax.client.channel import Endpoint, Tls
from tte_jax.client.mining import NegativeMiner, Refused
from tte_jax.client.retrieval import AsyncClient, Client
from tte_jax.client.stages import RemoteEmbedder, RemoteIndex, RemoteReasoner, RemoteReranker

__all__ = [
    "AsyncClient",
    "Client",
    "Endpoint",
    "NegativeMiner",
    "Refused",
    "RemoteEmbedder",
    "RemoteIndex",
    "RemoteReasoner",
    "RemoteReranker",
    "Tls",
]
