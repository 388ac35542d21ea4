"""Flags win over the environment, that over defaults; wrong values are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from servers.settings import DEFAULT_PORTS, SERVICES, Settings, parse
from tte_jax.errors import InvalidInputError


def test_flags_win_over_the_environment_and_that_over_defaults() -> None:
    environment = {"TTE_PORT": "5", "TTE_GRACE_S": "2.5", "TTE_DATA_DIR": "/data"}
    settings = parse(["index", "--port=7"], environment)
    assert (settings.port, settings.grace_s, settings.max_in_flight) == (7, 2.5, 64)
    assert settings.data_dir == Path("/data")
    assert settings.compile_cache_dir == Path("/data/compile-cache")


@pytest.mark.parametrize("service", SERVICES)
def test_each_service_has_its_usual_port(service: str) -> None:
    assert parse([service], {}).port == DEFAULT_PORTS[service]


def test_flags_make_the_same_settings_again() -> None:
    settings = parse(["embedder", "--port=0", "--dtype=bfloat16", "--data-dir=/x y"], {})
    assert parse(["embedder", *settings.flags()], {}) == settings
    # In whatever environment, where a flag has its default, too.
    told = {"TTE_PORT": "7000", "TTE_DTYPE": "bfloat16", "TTE_MESH": "tp=2", "TTE_HOST": "::"}
    settings = parse(["gateway", "--port=50060", "--dtype=float32"], {})
    assert parse(["gateway", *settings.flags()], told) == settings


def test_the_gateway_finds_stages_at_their_usual_ports_or_where_it_is_told() -> None:
    settings = Settings(index_address="dns:///index:1")
    assert settings.address_of("index") == "dns:///index:1"
    assert settings.address_of("reasoner") == f"127.0.0.1:{DEFAULT_PORTS['reasoner']}"


@pytest.mark.parametrize(
    ("arguments", "environment", "field"),
    [
        (["index", "--port=x"], {}, "port"),
        (["index"], {"TTE_GRACE_S": "soon"}, "grace_s"),
        (["index", "--port=70000"], {}, "port"),
        (["index", "--max-in-flight=0"], {}, "max_in_flight"),
        (["index", "--tls-cert=a"], {}, "tls_cert"),
        (["index"], {"TTE_LOG_LEVEL": "loud"}, "log_level"),
    ],
)
def test_wrong_values_are_named(arguments, environment, field) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse(arguments, environment)
    assert caught.value.field == field


def test_a_log_level_is_read_in_any_case() -> None:
    assert parse(["index"], {"TTE_LOG_LEVEL": "debug"}).log_level == "DEBUG"
