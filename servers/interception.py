"""One way to put something around every RPC, whatever its shape.

A guard is an async context manager that is entered before the handler and left after it, with the
handler's exception. `guarded` makes of it a handler of the same kind. Responses of a stream are
written by the wrapper itself, so that a cancelled call unwinds through the guard at once and not
when a forgotten generator is collected.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from inspect import isawaitable
from typing import Any

import grpc

Guard = Callable[[grpc.aio.ServicerContext], AbstractAsyncContextManager[Any]]

# Must answer whatever the state and the load: an orchestrator restarts a server that does not.
EXEMPT = ("/grpc.health.v1.", "/grpc.reflection.")


def is_exempt(method: str) -> bool:
    """Whether a full method name (`/package.Service/Method`) is health or reflection."""
    return method.startswith(EXEMPT)


def guarded(handler: grpc.RpcMethodHandler, guard: Guard) -> grpc.RpcMethodHandler:
    """A handler of the same kind that runs `handler` inside `guard(context)`."""
    inner: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )

    async def one_response(request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with guard(context):
            result = inner(request, context)
            return await result if isawaitable(result) else result

    async def many_responses(request: Any, context: grpc.aio.ServicerContext) -> None:
        async with guard(context):
            result = inner(request, context)
            if isawaitable(result):
                await result  # the handler writes by itself
            elif result is not None:
                async with aclosing(result):
                    async for message in result:
                        await context.write(message)

    make, call = {
        (False, False): (grpc.unary_unary_rpc_method_handler, one_response),
        (False, True): (grpc.unary_stream_rpc_method_handler, many_responses),
        (True, False): (grpc.stream_unary_rpc_method_handler, one_response),
        (True, True): (grpc.stream_stream_rpc_method_handler, many_responses),
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(
        call,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
