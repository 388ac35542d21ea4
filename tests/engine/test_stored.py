"""Programs kept between starts. Each test compiles a shape that no cache has seen."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_models
from tte_jax.engine import executables, programs
from tte_jax.engine.executables import ExecutableTable, backend_compiles, compile_cache_hits
from tte_jax.engine.next_token import Stops, advance
from tte_jax.engine.stored import StoredPrograms
from tte_jax.weights import hf


@pytest.fixture
def store(tmp_path):
    return StoredPrograms(tmp_path / "programs")


def unseen() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1 + secrets.randbelow(10**6), 3), jnp.float32)


def compiled(shape: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    return jax.jit(programs.normalised).lower(shape).compile()


def test_a_stored_program_does_what_the_compiled_one_did(store):
    shape = unseen()
    made = compiled(shape)
    key = store.key(programs.normalised, shape)
    assert store.load(key, (shape,), jax.devices()[:1]) is None
    store.save(key, made)
    again = StoredPrograms(store._directory).load(key, (shape,), jax.devices()[:1])
    x = np.random.default_rng(0).normal(size=shape.shape).astype(np.float32)
    np.testing.assert_array_equal(again(x), made(x))
    with pytest.raises(TypeError):
        again(x[:-1])


def test_a_torn_file_is_not_used(store):
    shape = unseen()
    key = store.key(programs.normalised, shape)
    store.save(key, compiled(shape))
    file = store._directory / key
    file.write_bytes(file.read_bytes()[:-10])
    assert store.load(key, (shape,), jax.devices()[:1]) is None
    file.write_bytes(b"")
    assert store.load(key, (shape,), jax.devices()[:1]) is None


def test_keys_tell_apart_what_makes_another_program(store):
    stops = Stops(stop=(1,), close_tag=(2,), forced_close=(2, 3))
    others = Stops(stop=(1,), close_tag=(2,), forced_close=(2, 4))
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    keys = [
        store.key(programs.normalised, shape),
        store.key(programs.normalised, jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)),
        store.key(programs.normalised, jax.ShapeDtypeStruct((3, 2), jnp.float32)),
        store.key(programs.encode_images, shape),
        store.key(partial(advance, stops=stops), shape),
        store.key(partial(advance, stops=others), shape),
    ]
    assert None not in keys and len(set(keys)) == len(keys)
    assert store.key(partial(advance, stops=stops), shape) == keys[4]


def test_what_cannot_be_named_is_not_kept(store):
    bound = object()
    unnamed: list[Any] = [
        lambda model, x: x,
        test_what_cannot_be_named_is_not_kept,  # of a module that is not part of the key
        partial(advance, stops=bound),  # says no more than its address
    ]
    assert [store.key(function) for function in unnamed] == [None] * 3


def test_a_table_finds_what_an_earlier_one_compiled(store, monkeypatch):
    monkeypatch.setattr(executables, "_stored", store)
    model, rows = hf.load(tiny_models.text_dir()), 1 + secrets.randbelow(10**4)
    shape = jax.ShapeDtypeStruct((rows, 2, 64), jnp.float32)
    x = np.random.default_rng(0).normal(size=shape.shape).astype(np.float32)
    found = []
    for _ in range(2):
        table = ExecutableTable(model)
        table.add("normalised", rows, _normalised, shape, tokens=0)
        before = backend_compiles(), compile_cache_hits()
        table.warmup()
        found.append((backend_compiles() - before[0], compile_cache_hits() - before[1]))
        y = table.run("normalised", rows, x)
        np.testing.assert_allclose(np.linalg.norm(y, axis=-1), 1, atol=1e-6)
    assert found == [(1, 0), (1, 1)]


def test_what_comes_from_the_other_cache_is_not_written_again(store, monkeypatch):
    """Its code would be missing: the program is there, and fails when it runs."""
    model, rows = hf.load(tiny_models.text_dir()), 1 + secrets.randbelow(10**4)
    for kept in (None, store):
        monkeypatch.setattr(executables, "_stored", kept)
        jax.clear_caches()
        table = ExecutableTable(model)
        shape = jax.ShapeDtypeStruct((rows, 2, 64), jnp.float32)
        table.add("normalised", rows, _normalised, shape, tokens=0)
        hits = compile_cache_hits()
        table.warmup()
    assert compile_cache_hits() == hits + 1
    assert list(store._directory.iterdir()) == []


def _normalised(model, x):
    return programs.normalised(x)


_normalised.__module__ = programs.__name__  # where a program has to stand
