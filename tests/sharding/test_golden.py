"""Where every parameter of the published shapes goes, compared with golden files.

The files were written by this code, so they catch changes, not mistakes. Against mistakes, each was
read line by line (every matrix is split over both axes but for `patch_ce`, whose values no axis
splits; vectors are whole but for biases of what tp splits; one size of each file was worked out by
hand), and the tests below compute totals, shares and what may be replicated by other means.

After a wanted change: `python -m tests.sharding.test_golden` writes them again; read the diff.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from tte_jax.errors import InternalError, InvalidInputError
from tte_jax.models.shapes import QWEN2_VL, shape_config
from tte_jax.plan import Parameter, dump, placed_parameters, plan
from tte_jax.sharding import Rules, abstract_mesh, parse_mesh, placement

GOLDEN = Path(__file__).parent / "golden"
MESHES = {"2B": "fsdp=4,tp=2", "7B": "fsdp=8,tp=4", "72B": "data=2,fsdp=8,tp=8"}
MIB = 2**20


def placed(name: str) -> list[Parameter]:
    return placed_parameters(shape_config(name), abstract_mesh(**parse_mesh(MESHES[name])))


def text(name: str) -> str:
    title = f"# Qwen2-VL-{name}, bfloat16, {MESHES[name]}: bytes are per device"
    return f"{title}\n{dump(placed(name))}"


@pytest.mark.parametrize("name", MESHES)
def test_placements_are_those_of_the_golden_file(name: str) -> None:
    assert text(name) == (GOLDEN / f"qwen2_vl_{name}.txt").read_text()


@pytest.mark.parametrize("name", MESHES)
def test_no_large_array_is_replicated(name: str) -> None:
    for p in placed(name):
        # A stack of vectors is small for what it is: 72B's norms, the largest, are 1.25 MiB.
        vectors = len(p.path.rsplit("_", 1)[-1]) == 1
        if prod(p.shape) * 2 > MIB and not vectors:
            assert any(p.placed.spec), p.path
        if vectors and not any(p.placed.spec):
            assert p.device_bytes < 2 * MIB, p.path


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("2B", 2_208_985_600), ("7B", 8_291_375_616), ("72B", 73_405_560_320)],
)
def test_the_shapes_are_the_published_ones(name: str, parameters: int) -> None:
    """Counted by hand from the configuration, matrix by matrix."""
    raw = QWEN2_VL[name]
    d, f, layers = raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"]
    kv = d // raw["num_attention_heads"] * raw["num_key_value_heads"]
    layer = 2 * d * d + 2 * d * kv + d + 2 * kv + 3 * d * f + 2 * d
    table = raw["vocab_size"] * d * (1 if raw["tie_word_embeddings"] else 2)
    e, wide = 1280, 5120
    block = 4 * e * e + 4 * e + 2 * 4 * e * e + 5 * e + 4 * e
    tower = 1176 * e + 32 * block + 2 * e + wide * wide + wide + wide * d + d
    total = layers * layer + table + d + tower
    assert sum(prod(p.shape) for p in placed(name)) == total == parameters


@pytest.mark.parametrize("name", MESHES)
def test_each_device_holds_little_more_than_its_share(name: str) -> None:
    sizes = parse_mesh(MESHES[name])
    whole = sum(prod(p.shape) * 2 for p in placed(name))
    share = whole / sizes["fsdp"] / sizes["tp"]  # data holds copies
    assert share <= sum(p.device_bytes for p in placed(name)) < 1.02 * share


def test_an_unknown_dimension_is_an_error() -> None:
    mesh = abstract_mesh(fsdp=2)
    with pytest.raises(InternalError, match="'text.layers.new_dx'.*not known: x"):
        placement("text.layers.new_dx", (4, 8, 8), mesh, Rules())
    with pytest.raises(InternalError, match="one letter"):
        placement("text.layers.q_d", (4, 8, 8), mesh, Rules())


def test_what_does_not_divide_stays_whole_and_is_reported() -> None:
    mesh = abstract_mesh(fsdp=2, tp=4)
    key = placement("text.layers.k_dkh", (3, 64, 2, 32), mesh, Rules())
    assert tuple(key.spec) == (None, "fsdp", None, None)
    assert key.whole == ("K=2 over tp=4",)
    merge = placement("visual.merge1_gg", (64, 64), mesh, Rules())
    assert tuple(merge.spec) == ("fsdp", "tp") and not merge.whole


@pytest.mark.parametrize("mesh", ["tp=0", "fsdp", "pp=2", "tp=2,tp=2", "tp=x"])
def test_a_mesh_that_is_not_understood(mesh: str) -> None:
    with pytest.raises(InvalidInputError, match="expected each of data, fsdp, tp"):
        parse_mesh(mesh)


def test_plan_is_the_formula() -> None:
    """2B on one device, worked out by hand from the published numbers."""
    made = plan(shape_config("2B"), parse_mesh(""), batch=2, tokens=100, patches=0)
    assert made.weights == 2 * 2_208_985_600
    assert made.kv_cache == 2 * 28 * 2 * 100 * 2 * 128 * 2
    halves = plan(shape_config("2B"), parse_mesh("tp=2"), batch=2, tokens=100, patches=0)
    assert halves.kv_cache == made.kv_cache // 2
    wide = plan(shape_config("2B"), parse_mesh("tp=4"), batch=2, tokens=100, patches=0)
    assert wide.kv_cache == made.kv_cache and wide.whole == ("K=2 over tp=4",)
    rows = plan(shape_config("2B"), parse_mesh("data=2"), batch=2, tokens=100, patches=0)
    assert rows.weights == made.weights and rows.kv_cache == made.kv_cache // 2


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for size in MESHES:
        (GOLDEN / f"qwen2_vl_{size}.txt").write_text(text(size))
