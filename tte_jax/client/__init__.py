"""Clients: the user's (`Client`, `AsyncClient`), the index's own (`IndexClient`), and the four
stages over gRPC for the gateway."""

from tte_jax.client.channel import Endpoint, Tls
from tte_jax.client.index import IndexClient, RemoteIndex
from tte_jax.client.mining import NegativeMiner, Refused
from tte_jax.client.retrieval import AsyncClient, Client
from tte_jax.client.stages import RemoteEmbedder, RemoteReasoner, RemoteReranker

__all__ = [
    "AsyncClient",
    "Client",
    "Endpoint",
    "IndexClient",
    "NegativeMiner",
    "Refused",
    "RemoteEmbedder",
    "RemoteIndex",
    "RemoteReasoner",
    "RemoteReranker",
    "Tls",
]
