"""Settings of a server process: a flag wins over `TTE_*` in the environment, that over the default.

Every field of `Settings` is both: `max_in_flight` is `--max-in-flight` and `TTE_MAX_IN_FLIGHT`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from tte_jax.errors import InvalidInputError
from tte_jax.limits import MAX_RERANK_CANDIDATES

SERVICES = ("reasoner", "embedder", "reranker", "index", "gateway")
DEFAULT_PORTS = {
    "gateway": 50060,
    "reasoner": 50061,
    "embedder": 50062,
    "reranker": 50063,
    "index": 50064,
}
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What one server process is told. Empty model directories mean the built-in models."""

    service: str = _setting("gateway", f"one of {', '.join(SERVICES)}, all")
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(-1, "gRPC port; 0 = any free one, -1 = the service's usual one")
    metrics_port: int = _setting(-1, "HTTP port of /metrics; 0 = any free one, -1 = none")
    tls_cert: str = _setting("", "PEM certificate chain; with --tls-key, serve TLS")
    tls_key: str = _setting("", "PEM private key")
    max_in_flight: int = _setting(64, "requests worked on at once; more are RESOURCE_EXHAUSTED")
    drain_delay_s: float = _setting(0.0, "seconds between NOT_SERVING and refusing requests")
    grace_s: float = _setting(30.0, "seconds that running requests get to end at shutdown")
    log_level: str = _setting("INFO", "DEBUG, INFO, WARNING or ERROR")

    data_dir: Path = _setting(Path(".tte"), "corpus, logs, caches and the state of `all`")
    compile_cache: str = _setting("", "compiled programs; empty = compile-cache in the data dir")
    index: str = _setting(
        "", "scann, milvus://host:19530 or milvus:FILE; empty = as the corpus remembers, else scann"
    )
    reasoner_model: str = _setting("", "model directory")
    embedder_model: str = _setting("", "model directory")
    reranker_model: str = _setting("", "model directory")
    dtype: str = _setting("float32", "precision of the models: float32 or bfloat16")
    quantise: str = _setting("", "int8 = matrices of linear layers as int8; empty = as dtype says")
    listwise: int = _setting(
        0, "reranker: most candidates of one generated order; 0 = pointwise only"
    )
    mesh: str = _setting("", "devices of a model service, as in fsdp=2,tp=2; empty = one device")

    reasoner_address: str = _setting("", "where the gateway finds it; empty = the usual port")
    embedder_address: str = _setting("", "where the gateway finds it; empty = the usual port")
    next_embedder_address: str = _setting("", "embedder to change over to, see operations")
    reranker_address: str = _setting("", "where the gateway finds it; empty = the usual port")
    index_address: str = _setting("", "where the gateway finds it; empty = the usual port")

    parent_pid: int = _setting(0, "end when this process ends; set by the supervisor")

    def __post_init__(self) -> None:
        if self.service not in (*SERVICES, "all"):
            raise InvalidInputError(
                f"service {self.service!r} is unknown: expected {', '.join(SERVICES)} or all",
                field="service",
            )
        if not -1 <= self.port <= 65535 or not -1 <= self.metrics_port <= 65535:
            raise InvalidInputError(
                f"port {self.port} / metrics port {self.metrics_port}: expected -1 to 65535",
                field="port",
            )
        if self.max_in_flight < 1:
            raise InvalidInputError(
                f"max_in_flight is {self.max_in_flight}: expected at least 1", field="max_in_flight"
            )
        if not 0 <= self.listwise <= MAX_RERANK_CANDIDATES:
            raise InvalidInputError(
                f"listwise is {self.listwise}: expected 0 (off) to {MAX_RERANK_CANDIDATES}",
                field="listwise",
            )
        object.__setattr__(self, "log_level", self.log_level.upper())
        if self.log_level not in LOG_LEVELS:
            raise InvalidInputError(
                f"log_level is {self.log_level!r}: expected {', '.join(LOG_LEVELS)}",
                field="log_level",
            )
        if self.drain_delay_s < 0 or self.grace_s < 0:
            raise InvalidInputError(
                "drain_delay_s and grace_s are seconds, at least 0", field="grace_s"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InvalidInputError(
                "TLS needs both a certificate and a key: give --tls-cert and --tls-key",
                field="tls_cert",
            )
        if self.port == -1:
            usual = "gateway" if self.service == "all" else self.service
            object.__setattr__(self, "port", DEFAULT_PORTS[usual])

    def address_of(self, service: str) -> str:
        """`host:port` (or any gRPC target) at which the gateway reaches a stage."""
        given = getattr(self, f"{service}_address")
        return given or f"{self.host}:{DEFAULT_PORTS[service]}"

    @property
    def compile_cache_dir(self) -> Path:
        """Where JAX keeps compiled programs between starts."""
        return Path(self.compile_cache) if self.compile_cache else self.data_dir / "compile-cache"

    def flags(self) -> list[str]:
        """The command-line flags that make these settings, for a child process: every one, since
        the child has the same environment, which a flag that is left out would give way to."""
        names = [item.name for item in fields(self) if item.name != "service"]
        return [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in names]


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from `[service, --flag=value, ...]` and the environment.

    Raises:
      InvalidInputError: a value is not of its type or out of range.
      SystemExit: argparse found unknown flags (or `--help`).
    """
    environment = os.environ if environment is None else environment
    hints = get_type_hints(Settings)
    parser = argparse.ArgumentParser(prog="python -m servers")
    parser.add_argument("service", choices=(*SERVICES, "all"))
    for item in fields(Settings):
        if item.name == "service":
            continue
        assert item.default is not MISSING
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=item.name,
            metavar=hints[item.name].__name__.upper(),
            help=f"{item.metadata['help']} (default: {item.default or 'none'})",
        )
    given = vars(parser.parse_args(list(arguments)))
    values: dict[str, Any] = {"service": given.pop("service")}
    for name, flag in given.items():
        source, text = f"--{name.replace('_', '-')}", flag
        if text is None:
            source = f"TTE_{name.upper()}"
            text = environment.get(source)
        if text is None:
            continue
        try:
            values[name] = hints[name](text)
        except ValueError:
            raise InvalidInputError(
                f"{source} is {text!r}: expected {hints[name].__name__}", field=name
            ) from None
    return Settings(**values)


def for_service(settings: Settings, service: str, **changes: Any) -> Settings:
    """The settings of one service of `all`, with its own port."""
    return replace(settings, service=service, **changes)
