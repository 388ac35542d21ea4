"""What the three model services share: opening the model, warming up, metrics, `Info`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import jax

from servers.runtime import Service
from servers.settings import Settings
from tte.v1 import model_pb2
from tte_jax.builtin import models
from tte_jax.engine.executables import compile_cache_hits, enable_compile_cache
from tte_jax.engine.role import Role
from tte_jax.plan import unsplit
from tte_jax.sharding import make_mesh, parse_mesh

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Role)


async def open_role(kind: type[R], settings: Settings, model: str, builtin: str) -> R:
    """Opens a role's model directory off the event loop; `model` empty = the built-in one.

    Raises:
      InvalidInputError: a mesh that is not understood or has not as many devices as there are.
      NotFoundError, PreconditionError: as `engine.served_model.open_model`.
    """
    enable_compile_cache(settings.compile_cache_dir)
    directory = models.resolve(model or builtin)
    sizes = parse_mesh(settings.mesh)
    mesh = None
    if settings.mesh:
        mesh = make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], tp=sizes["tp"])
    role = await asyncio.to_thread(
        kind.from_pretrained,
        directory,
        dtype=settings.dtype,
        mesh=mesh,
        quantise=settings.quantise or None,
    )
    if mesh is not None:
        for note in unsplit(role.served.config, mesh):
            log.warning("%s: not split: %s; every device holds it", role.served.name, note)
    return role


def model_service(
    role: Role,
    name: str,
    register: Callable[[grpc.aio.Server], None],
    metrics: Mapping[str, Callable[[], float]] | None = None,
    *,
    beside: Sequence[Role] = (),
) -> Service:
    """The service of a role: warm-up and closing on threads, counters as metrics.

    Args:
      beside: roles of the same service, warmed before it, so that its count of compilations is the
        process's, and closed after it.
    """

    async def warm() -> None:
        def progress(done: int, total: int, program: str) -> None:
            log.info("%s: compiled %d of %d: %s", role.served.name, done, total, program)

        for one in (*beside, role):
            await asyncio.to_thread(one.warmup, progress)
        log.info(
            "%s is warm: %d programs in %.1f s, %d of %d compilations from the cache",
            role.version,
            len(role.table),
            role.table.warmup_s,
            compile_cache_hits(),
            role.compile_count,
        )

    async def close() -> None:
        for one in (role, *beside):
            await asyncio.to_thread(one.close)

    stats = role.queue.stats
    gauges: dict[str, Callable[[], float]] = {
        "compile_count": lambda: role.compile_count,
        "warm_compile_count": lambda: role.warm_compile_count,
        "queue_depth": lambda: len(role.queue),
        "queue_tokens": lambda: role.queue.queued_cost,
        "queue_rejected": lambda: stats.rejected,
        "queue_expired": lambda: stats.expired,
        "queue_cancelled": lambda: stats.cancelled,
        "queue_seconds": lambda: stats.queue_s,
        "batches": lambda: stats.batches,
        "batch_fill": lambda: stats.batch_fill,
        "pad_share": lambda: stats.pad_share,
        "tokens": lambda: stats.tokens,
        "cached_tokens": lambda: stats.cached_tokens,
        "items_completed": lambda: stats.completed,
        "items_failed": lambda: stats.failed,
    }
    return Service(
        names=(name,),
        register=register,
        warm=warm,
        close=close,
        metrics=gauges | dict(metrics or {}),
    )


def model_info(role: Role, *, dimension: int = 0) -> model_pb2.ModelInfo:
    """The answer of `Info`."""
    return model_pb2.ModelInfo(
        model_name=role.served.name,
        model_version=role.version,
        architecture=role.served.config.model_type,
        device=jax.devices()[0].device_kind,
        dtype=", ".join(filter(None, (role.served.dtype, role.served.quantise))),
        max_sequence_tokens=role.max_sequence_tokens,
        accepts_media=role.accepts_media,
        dimension=dimension,
        max_new_tokens=role.max_new_tokens,
        compile_count=role.compile_count,
        warm_compile_count=role.warm_compile_count,
        queue_depth=len(role.queue),
        queue_capacity=role.queue.capacity,
    )


def time_left(context: Any) -> float | None:
    """Seconds until the caller's deadline; None when it set none."""
    return context.time_remaining()
