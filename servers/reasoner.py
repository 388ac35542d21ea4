"""ReasonerService: embedding-centric reasonings and query-aware rewrites."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from servers import convert
from servers.model_service import model_info, model_service, open_role, time_left
from servers.runtime import Service
from servers.settings import Settings
from tte.v1 import reasoner_pb2, reasoner_pb2_grpc
from tte_jax.builtin import models
from tte_jax.local import LocalReasoner
from tte_jax.reasoner import Delta, Finished, Reasoner, total

NAME = "tte.v1.ReasonerService"


class ReasonerServicer(reasoner_pb2_grpc.ReasonerServiceServicer):
    """The RPCs of `protos/tte/v1/reasoner.proto` over a `Reasoner`."""

    def __init__(self, reasoner: Reasoner) -> None:
        self._stage = LocalReasoner(reasoner)

    async def Reason(
        self, request: reasoner_pb2.ReasonRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[reasoner_pb2.ReasonResponse]:
        items, max_tokens, sampling = convert.reason_arguments(request)
        finished: list[Finished] = []
        events = self._stage.stream(
            items,
            max_tokens=max_tokens,
            timeout_s=time_left(context),
            sampling=sampling,
            deltas=not request.omit_deltas,
            embed=request.embed,
        )
        # Closed at once when the call is cancelled, which frees its decode slots.
        async with aclosing(events):
            async for event in events:
                match event:
                    case Delta(index, text, tokens):
                        yield convert.reason_delta(index, text, tokens)
                    case Finished(index, reasoning, embedding=embedding):
                        finished.append(event)
                        yield convert.reason_result(index, reasoning, embedding)
        role = self._stage.role
        yield convert.reason_usage(total(role.stage, role.version, finished))

    async def Info(
        self, request: reasoner_pb2.ReasonerServiceInfoRequest, context: grpc.aio.ServicerContext
    ) -> reasoner_pb2.ReasonerServiceInfoResponse:
        role = self._stage.role
        info = model_info(role, dimension=role.dimension)
        info.embeds_reasonings = role.embeds
        return reasoner_pb2.ReasonerServiceInfoResponse(model=info)


async def create(settings: Settings) -> Service:
    """Opens the model that `settings.reasoner_model` names.

    Raises:
      NotFoundError, PreconditionError: no such model, or not one for this role.
    """
    role = await open_role(Reasoner, settings, settings.reasoner_model, models.REASONER)
    servicer = ReasonerServicer(role)
    return model_service(
        role,
        NAME,
        lambda server: reasoner_pb2_grpc.add_ReasonerServiceServicer_to_server(servicer, server),
        {
            "active_slots": lambda: role.loop.active,
            "tokens_generated": lambda: role.loop.stats.tokens_out,
            "slot_steps": lambda: role.loop.stats.slot_steps,
            "slots_embedded": lambda: role.loop.stats.embedded,
        },
    )
