"""Prometheus metrics of a server: requests by method and code, and the service's own gauges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from wsgiref.simple_server import WSGIServer

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from servers.interception import guarded, is_exempt

# A cached embedding takes about 1 ms, a cold search on a laptop some seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics(grpc.aio.ServerInterceptor):
    """Counts and times every request; health and reflection stay out of the figures.

    Gauges are read when they are scraped: `gauges` maps a name such as `compile_count` to a
    function, exported as `tte_compile_count{service="..."}`. The functions run on the scraping
    thread and must not block.
    """

    def __init__(self, service: str, gauges: Mapping[str, Callable[[], float]]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tte_requests_total",
            "Requests by method and gRPC code.",
            ("method", "code"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "tte_request_seconds",
            "Seconds from a request's arrival to its end, streams included.",
            ("method",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Gauges(service, gauges))

    def serve(self, host: str, port: int) -> WSGIServer:
        """Serves `/metrics` on a thread of its own until `shutdown()` of what it returns.

        Raises:
          OSError: the port is taken.
        """
        server, _ = start_http_server(port, host, registry=self.registry)
        return server

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or is_exempt(method):
            return handler

        @asynccontextmanager
        async def counted(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
            start = time.perf_counter()
            code = grpc.StatusCode.UNKNOWN
            try:
                yield
                code = _code(context) or grpc.StatusCode.OK
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except BaseException:
                code = _code(context) or grpc.StatusCode.UNKNOWN
                raise
            finally:
                self._requests.labels(method, code.name).inc()
                self._seconds.labels(method).observe(time.perf_counter() - start)

        return guarded(handler, counted)


class _Gauges(Collector):
    def __init__(self, service: str, gauges: Mapping[str, Callable[[], float]]) -> None:
        self._service = service
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, read in self._gauges.items():
            family = GaugeMetricFamily(f"tte_{name}", name.replace("_", " "), labels=["service"])
            family.add_metric([self._service], float(read()))
            yield family


def _code(context: grpc.aio.ServicerContext) -> grpc.StatusCode | None:
    """The status set on the context, if any. grpc.aio keeps the number; 0 is "not set" or OK."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((c for c in grpc.StatusCode if c.value[0] == code), None)
