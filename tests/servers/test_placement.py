"""A model service told `--mesh` and `--quantise`: a real process over four host devices."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from servers import runtime
from tests import compile_cache, tiny_models
from tests.sharding.runs import ROOT
from tte.v1 import embedder_pb2, embedder_pb2_grpc
from tte_jax.cli import launch
from tte_jax.client.stages import RemoteEmbedder
from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.errors import InvalidInputError
from tte_jax.stages import EmbedItem

PATIENCE_S = 240.0
ITEMS = [
    EmbedItem(Content.of("a smiling cat"), Side.QUERY),
    EmbedItem(Content.of("What is this?", tiny_models.png(1)), Side.QUERY),
    EmbedItem(Content.of("", tiny_models.png(2, 28, 56)), Side.DOCUMENT),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(log: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "servers", "embedder", *flags]
    command += [
        f"--embedder-model={tiny_models.vl_dir()}",
        f"--compile-cache={compile_cache.directory()}",
        f"--parent-pid={os.getpid()}",
    ]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.timeout(2 * PATIENCE_S)
async def test_a_service_on_a_mesh_with_int8(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    process = start(log, f"--port={port}", "--mesh=fsdp=2,tp=2", "--quantise=int8")
    try:
        with Embedder.from_pretrained(tiny_models.vl_dir(), quantise="int8") as alone:
            expected = alone.embed(ITEMS)
            whole = tiny_models.embedder().embed(ITEMS)
        stage = RemoteEmbedder(f"127.0.0.1:{port}")
        until = time.monotonic() + PATIENCE_S
        while not await stage.serving():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
        vectors, _ = await stage.embed(ITEMS, timeout_s=60)
        await stage.close()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
            info = (await stub.Info(embedder_pb2.EmbedderServiceInfoRequest())).model
    finally:
        process.terminate()
        process.wait(60)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    assert np.abs(whole - expected).max() > 1e-4  # int8 really came into it
    assert info.dtype == "float32, int8"
    assert info.compile_count == info.warm_compile_count > 0
    assert info.model_version == tiny_models.embedder().version


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--mesh=fsdp=3", "needs 3 devices, but there are 4"), ("--quantise=int4", "'int4'.*int8")],
)
def test_what_cannot_be_served_ends_the_start(tmp_path: Path, flag: str, said: str) -> None:
    process = start(tmp_path / "log", f"--port={free_port()}", flag)
    assert process.wait(PATIENCE_S) == runtime.EXIT_CONFIGURATION
    text = (tmp_path / "log").read_text()
    assert re.search(said, text), text


def test_flags_of_tte_serve_reach_the_services() -> None:
    assert launch.placement_flags("", "") == []
    assert launch.placement_flags("int8", "fsdp=2,tp=2") == [
        "--quantise=int8",
        "--mesh=fsdp=2,tp=2",
    ]
    for quantise, mesh, field in (("int4", "", "--quantise"), ("", "pp=2", "mesh")):
        with pytest.raises(InvalidInputError) as caught:
            launch.placement_flags(quantise, mesh)
        assert caught.value.field == field
