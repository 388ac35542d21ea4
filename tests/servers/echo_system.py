"""Two echo servers under the real supervisor, as a process of its own.

    python -m tests.servers.echo_system DATA_DIR [FIRST_PORT]

The second starts when the first serves. FIRST_PORT fixes the first one's port.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

from servers.supervisor import Pace, Spec, StartError, Supervisor
from tte_jax.errors import TteError

PACE = Pace(poll=0.02, watch=0.05, backoff=0.05, grace=5, hung=1.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spec(name: str, wave: int, port: int) -> Spec:
    command = (sys.executable, "-m", "tests.servers.echo", f"--port={port}")
    return Spec(name, command, f"127.0.0.1:{port}", wave)


async def main() -> int:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    first = int(sys.argv[2]) if len(sys.argv) > 2 else free_port()
    specs = [spec("first", 0, first), spec("second", 1, free_port())]
    try:
        await Supervisor(specs, data_dir=Path(sys.argv[1]), pace=PACE).run(stop)
    except StartError as error:
        print(error, file=sys.stderr)
        return error.code
    except TteError as error:
        print(error.message, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
