"""A tiny real service for the runtime's tests: the embedder's RPCs with hand-computable answers.

    python -m tests.servers.echo --port=0      # prints "ready PORT"

`Embed` answers the text's length in each vector after the milliseconds that `instruction` says; the
instruction `fail` raises, and `overload` raises `OverloadedError`.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field

import grpc
import numpy as np

from servers import runtime
from servers.settings import Settings, parse
from tte.v1 import embedder_pb2, embedder_pb2_grpc, vector_pb2
from tte_jax.errors import InvalidInputError, OverloadedError

NAME = "tte.v1.EmbedderService"


@dataclass
class Echo(embedder_pb2_grpc.EmbedderServiceServicer):
    """Counts what it finished, so that tests can compare it with what clients got."""

    answered: int = 0
    running: int = 0
    closed: bool = False
    hold: asyncio.Event = field(default_factory=asyncio.Event)

    async def Embed(self, request, context):
        self.running += 1
        try:
            how = request.inputs[0].instruction
            if how == "fail":
                raise RuntimeError("secret detail")
            if how == "overload":
                raise OverloadedError("full", retry_after_s=0.25)
            if how == "invalid":
                raise InvalidInputError("no such side", field="inputs[0].side", given=7)
            if how == "hold":
                await self.hold.wait()
            elif how:
                await asyncio.sleep(float(how) / 1000)
            vectors = [np.float32([len(i.content.parts[0].text)]).tobytes() for i in request.inputs]
            self.answered += 1
            return embedder_pb2.EmbedResponse(
                embeddings=[
                    vector_pb2.Vector(data=v, dtype=vector_pb2.DTYPE_FLOAT32, dimension=1)
                    for v in vectors
                ]
            )
        finally:
            self.running -= 1

    async def service(self, settings: Settings) -> runtime.Service:
        async def warm() -> None:
            pass

        async def close() -> None:
            assert self.running == 0, "closed while requests were running"
            self.closed = True

        return runtime.Service(
            names=(NAME,),
            register=lambda s: embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(self, s),
            warm=warm,
            close=close,
            metrics={"compile_count": lambda: 3},
        )


def request(text: str = "abc", how: str = "") -> embedder_pb2.EmbedRequest:
    item = embedder_pb2.EmbedInput(instruction=how)
    item.content.parts.add(text=text)
    return embedder_pb2.EmbedRequest(inputs=[item])


def stub(port: int) -> tuple[grpc.aio.Channel, embedder_pb2_grpc.EmbedderServiceAsyncStub]:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    return channel, embedder_pb2_grpc.EmbedderServiceStub(channel)


if __name__ == "__main__":
    settings = parse(["embedder", *sys.argv[1:]])
    runtime.die_with_parent(settings.parent_pid)
    sys.exit(runtime.run(settings, Echo().service))
