"""The supervisor's picture of the system: a table that lives on a terminal, lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tte_jax.system_state import SystemState

_STYLES = {
    "serving": "green",
    "starting": "yellow",
    "waiting": "dim",
    "stopped": "dim",
    "stopping": "yellow",
    "restarting": "bold red",
    "unhealthy": "bold red",
}


class StatusView:
    """`with StatusView() as view: view.show(state)`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console) if self._console.is_terminal else None
        self._said: dict[str, str] = {}
        self._ready = False

    def __enter__(self) -> StatusView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, state: SystemState) -> None:
        """Shows the state; without a terminal, what has changed since the last one."""
        if self._live:
            self._live.update(_table(state))
        else:
            for service in state.services:
                if self._said.get(service.name) != service.state:
                    self._said[service.name] = service.state
                    line = f"{service.name}: {service.state} at {service.address}"
                    self._console.print(line, highlight=False, soft_wrap=True)
        if state.ready and not self._ready:
            gateway = state.services[-1]
            self._console.print(f"ready: {gateway.name} at {gateway.address}", highlight=False)
        self._ready = state.ready


def _table(state: SystemState) -> Table:
    table = Table(caption="Ctrl-C stops everything", caption_justify="left")
    for column in ("service", "state", "address", "metrics", "process", "restarts"):
        table.add_column(column)
    for s in state.services:
        shown = f"[{_STYLES.get(s.state, '')}]{s.state}[/]"
        table.add_row(s.name, shown, s.address, s.metrics, str(s.pid or ""), str(s.restarts))
    return table
