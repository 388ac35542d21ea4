from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_models
from tte_jax.engine.executables import ExecutableTable, backend_compiles, enable_compile_cache
from tte_jax.errors import InternalError, PreconditionError, UnavailableError
from tte_jax.weights import hf


def double(model, x):
    return x * 2 + model.text.norm_d[...].sum() * 0


@pytest.fixture(scope="module")
def model():
    return hf.load(tiny_models.text_dir())


@pytest.fixture
def table(model):
    made = ExecutableTable(model)
    for size in (2, 4):
        made.add("double", size, double, jax.ShapeDtypeStruct((size,), jnp.float32), tokens=0)
    return made


def test_the_table_compiles_once_and_serves_without_compiling(table):
    seen = []
    before = backend_compiles()
    table.warmup(lambda done, total, name: seen.append((done, total, name)))
    assert backend_compiles() == before + 2
    assert [(d, t) for d, t, _ in seen] == [(1, 2), (2, 2)]
    assert {name for *_, name in seen} == {"double[2]", "double[4]"}
    assert (len(table), table.ready) == (2, True)
    table.warmup()
    np.testing.assert_array_equal(table.run("double", 2, np.float32([1, 2])), [2, 4])
    assert backend_compiles() == before + 2


def test_a_shape_that_was_not_compiled_is_an_error_at_once(table):
    table.warmup()
    before = backend_compiles()
    with pytest.raises(InternalError, match=r"double\[3\].*not compiled"):
        table.run("double", 3, np.zeros(3, np.float32))
    with pytest.raises(TypeError):
        table.run("double", 4, np.zeros(3, np.float32))
    with pytest.raises(TypeError):
        table.run("double", 4, np.zeros(4, np.int32))
    assert backend_compiles() == before


def test_a_cancelled_warm_up_ends_early(table):
    with pytest.raises(UnavailableError):
        table.warmup(lambda *_: table.cancel())
    assert not table.ready


def test_the_compile_cache_belongs_to_its_owner_alone(tmp_path):
    kept = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_entry_size_bytes",
            "jax_persistent_cache_min_compile_time_secs",
        )
    }
    try:
        made = enable_compile_cache(tmp_path / "new" / "cache")
        assert made.stat().st_mode & 0o777 == 0o700
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        with pytest.raises(PreconditionError, match="others can write"):
            enable_compile_cache(shared)
        (tmp_path / "file").write_text("")
        with pytest.raises(PreconditionError, match="cannot be created"):
            enable_compile_cache(tmp_path / "file" / "cache")
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)
