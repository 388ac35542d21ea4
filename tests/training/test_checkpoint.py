"""Checkpoints of runs: what is kept, what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import child
from training.checkpoint import RunCheckpoints
from tte_jax.errors import PreconditionError


def state(seed: int) -> Any:
    params = {"a.b_dn": jax.random.normal(jax.random.key(seed), (4, 8)), "s": jnp.float32(seed)}
    return {"trained": params, "optimiser": optax.adamw(1e-3).init(params)}


def test_it_comes_back_bit_for_bit_and_can_be_donated(tmp_path: Path) -> None:
    kept = RunCheckpoints(tmp_path)
    assert kept.latest() is None and kept.best() is None
    position = {"step": 3, "round": "9f", "offset": 12}
    kept.save(3, state(1), position, None)
    kept.close()
    again = RunCheckpoints(tmp_path)
    assert again.latest() == 3 and again.position(3) == position
    found = again.restore(3, state(2))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state(1)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    used = found["trained"]["a.b_dn"]
    jax.jit(lambda x: x + 1, donate_argnums=0)(used).block_until_ready()
    assert used.is_deleted()
    again.close()


@pytest.mark.parametrize("lower", [True, False])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, lower: bool) -> None:
    kept = RunCheckpoints(tmp_path, last=2, best=1, metric="hit", lower=lower)
    for step, value in enumerate([0.5, 0.9 - lower, 0.4, 0.6, 0.5], start=1):
        kept.save(step, state(step), {"step": step}, {"hit": value})
        kept.wait()
    assert kept.steps() == [2, 4, 5]
    assert kept.best() == 2
    kept.close()


def test_one_without_the_metric_is_not_the_best(tmp_path: Path) -> None:
    kept = RunCheckpoints(tmp_path, last=1, best=1, metric="hit")
    kept.save(1, state(1), {}, {"hit": 0.1})
    for step in (2, 3):
        kept.save(step, state(step), {}, None)
        kept.wait()
    assert kept.steps() == [1, 3] and kept.best() == 1
    kept.close()


def test_another_model_is_refused(tmp_path: Path) -> None:
    kept = RunCheckpoints(tmp_path)
    kept.save(1, state(1), {}, None)
    kept.wait()
    with pytest.raises(PreconditionError, match="another model"):
        kept.restore(1, {"trained": {"other": jnp.zeros(3)}})
    kept.close()


def onto_a_mesh(folder: str) -> None:
    """In a child with eight devices."""
    from jax.sharding import NamedSharding, PartitionSpec

    from tte_jax import sharding

    mesh = sharding.make_mesh(fsdp=4, tp=2)
    where = NamedSharding(mesh, PartitionSpec("fsdp", "tp"))
    like = {"x": jax.device_put(jnp.zeros((8, 4)), where)}
    kept = RunCheckpoints(folder)
    found = kept.restore(1, like)["x"]
    assert found.sharding == where
    np.testing.assert_array_equal(np.asarray(found), np.arange(32.0).reshape(8, 4))
    kept.close()


def test_another_mesh_reads_it(tmp_path: Path) -> None:
    kept = RunCheckpoints(tmp_path)
    kept.save(1, {"x": jnp.arange(32.0).reshape(8, 4)}, {}, None)
    kept.close()
    child.run("tests.training.test_checkpoint", "onto_a_mesh", str(tmp_path), devices=8)
