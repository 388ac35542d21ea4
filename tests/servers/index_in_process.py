"""An index service in this process, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from servers import index as index_service
from servers import runtime
from servers.settings import Settings


@contextlib.asynccontextmanager
async def listening(data_dir: Path, **settings: Any) -> AsyncIterator[str]:
    """Its address."""
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    chosen = Settings(service="index", port=0, grace_s=5.0, data_dir=data_dir, **settings)
    task = asyncio.create_task(
        runtime.serve(chosen, index_service.create, stop=stop, ready=port.set_result)
    )
    await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield f"127.0.0.1:{port.result()}"
    finally:
        stop.set()
        await task
