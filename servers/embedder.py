"""EmbedderService: contents and their reasonings to vectors."""

from __future__ import annotations

import grpc

from servers import convert
from servers.model_service import model_info, model_service, open_role, time_left
from servers.runtime import Service
from servers.settings import Settings
from tte.v1 import embedder_pb2, embedder_pb2_grpc
from tte_jax.builtin import models
from tte_jax.embedder import Embedder
from tte_jax.local import LocalEmbedder

NAME = "tte.v1.EmbedderService"


class EmbedderServicer(embedder_pb2_grpc.EmbedderServiceServicer):
    """The RPCs of `protos/tte/v1/embedder.proto` over an `Embedder`."""

    def __init__(self, embedder: Embedder) -> None:
        self._stage = LocalEmbedder(embedder)

    async def Embed(
        self, request: embedder_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> embedder_pb2.EmbedResponse:
        items, dimension = convert.embed_arguments(request)
        vectors, usage = await self._stage.embed(
            items, dimension=dimension, timeout_s=time_left(context)
        )
        return convert.embed_response(vectors, usage)

    async def Info(
        self, request: embedder_pb2.EmbedderServiceInfoRequest, context: grpc.aio.ServicerContext
    ) -> embedder_pb2.EmbedderServiceInfoResponse:
        role = self._stage.role
        return embedder_pb2.EmbedderServiceInfoResponse(
            model=model_info(role, dimension=role.dimension)
        )


async def create(settings: Settings) -> Service:
    """Opens the model that `settings.embedder_model` names.

    Raises:
      NotFoundError, PreconditionError: no such model, or not one for this role.
    """
    role = await open_role(Embedder, settings, settings.embedder_model, models.EMBEDDER)
    servicer = EmbedderServicer(role)
    return model_service(
        role,
        NAME,
        lambda server: embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(servicer, server),
    )
