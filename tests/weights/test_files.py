"""Parts of tensors in files are what NumPy cuts out of the whole."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tte_jax.errors import DataLossError, PreconditionError
from tte_jax.weights import files
from tte_jax.weights.table import Entry

SLICES = {
    "all": (slice(None), slice(None), slice(None)),
    "outer": (slice(1, 3), slice(None), slice(None)),
    "middle": (slice(None), slice(1, 3), slice(None)),
    "inner": (slice(None), slice(0, 4), slice(2, 5)),
    "everything": (slice(2, 3), slice(3, 4), slice(0, 1)),
    "nothing": (slice(1, 1), slice(None), slice(None)),
}


@pytest.mark.parametrize("chosen", SLICES.values(), ids=SLICES)
def test_runs_are_the_chosen_places_in_memory_order(chosen: tuple[slice, ...]) -> None:
    shape = (3, 4, 5)
    flat = [i for begin, end in files.runs(shape, chosen) for i in range(begin, end)]
    assert flat == np.arange(60).reshape(shape)[chosen].ravel().tolist()


def test_what_lies_together_is_one_run() -> None:
    assert files.runs((3, 4, 5), (slice(1, 3), slice(0, 4), slice(None))) == [(20, 60)]
    assert files.runs((), ()) == [(0, 1)]


@pytest.mark.parametrize("piece", [1, 7, 10**6])
@pytest.mark.parametrize("shape", [(12,), (12, 8), (12, 2, 4)])
def test_any_rows_and_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], piece: int
) -> None:
    monkeypatch.setattr(files, "PIECE_VALUES", piece)
    whole = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    stored = files.tensors(tmp_path)["w"]
    assert stored.shape == shape
    matrix = whole.reshape(12, -1)
    rows, columns = [(1, 4), (9, 12)], [(0, 1)] if len(shape) == 1 else [(2, 3), (5, 8)]
    expected = matrix[[1, 2, 3, 9, 10, 11]][:, [i for a, b in columns for i in range(a, b)]]
    into = np.full(expected.shape, np.nan, np.float32)
    stored.read(rows, columns, into=into)
    np.testing.assert_array_equal(into, expected.astype(np.float32))
    turned = np.full(expected.shape[::-1], np.nan, ml_dtypes.bfloat16)
    stored.read(rows, columns, into=turned.T)
    np.testing.assert_array_equal(turned, expected.T)


def test_reading_holds_one_piece_besides_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_VALUES", 2**15)
    whole = np.zeros((2048, 1024), np.float32)  # 8 MiB
    save_file({"w": whole}, tmp_path / "model.safetensors")
    stored = files.tensors(tmp_path)["w"]
    tracemalloc.start()
    try:
        stored.read([(0, 2048)], [(0, 1024)], into=whole)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 4 * 2**15 <= peak < 4 * 4 * 2**15


@pytest.mark.parametrize("with_index", [False, True])
def test_a_tensor_in_two_files_is_refused(tmp_path: Path, with_index: bool) -> None:
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"model.norm.weight": np.zeros(2, np.float32)}, one)
    # Another name of the same tensor.
    save_file({"model.language_model.norm.weight": np.ones(2, np.float32)}, two)
    names = {"model.norm.weight": one.name, "model.language_model.norm.weight": two.name}
    if with_index:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(PreconditionError) as caught:
        files.tensors(tmp_path)
    assert caught.value.reason == "MODEL_WEIGHTS_MISMATCH"
    assert all(str(x) in caught.value.message for x in (one, two, *names))


@pytest.mark.parametrize("content", ['{"weight', "", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_torn_index_is_named(tmp_path: Path, content: str) -> None:
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(PreconditionError, match=r"model\.safetensors\.index\.json"):
        files.tensors(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((64, 64), np.float32)}, path)
    stored = files.tensors(tmp_path)["w"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataLossError, match=r"model\.safetensors' is damaged"):
        stored.read([(0, 64)], [(0, 64)], into=np.zeros((64, 64), np.float32))


@pytest.mark.parametrize(
    ("inputs", "ours", "file"),
    [
        (1, (6, 2, 4), (8, 6)),  # q_dnh
        (2, (2, 4, 6), (6, 8)),  # o_nhd
        (1, (24, 5), (5, 3, 2, 2, 2)),  # patch_ce
        (0, (7, 6), (7, 6)),  # embed_vd
        (0, (3, 2, 4), (24,)),  # qkv_bias_3nh
    ],
)
def test_layouts(inputs: int, ours: tuple[int, ...], file: tuple[int, ...]) -> None:
    """`matrix` is a view of our array: filling it with the file's tensor fills ours."""
    entry = Entry("a", "b", inputs, file)
    tensor = np.arange(np.prod(file)).reshape(file)
    value = np.empty(ours, tensor.dtype)
    entry.matrix(value)[...] = tensor.reshape(file[0], -1)
    if inputs:
        # PyTorch computes y = x W^T; ours is y = x W with both sides split.
        x = np.arange(np.prod(ours[:inputs]))
        y = np.tensordot(x.reshape(ours[:inputs]), value, axes=inputs)
        np.testing.assert_array_equal(y.ravel(), tensor.reshape(file[0], -1) @ x)
    else:
        np.testing.assert_array_equal(value.ravel(), tensor.ravel())
    np.testing.assert_array_equal(entry.to_hf(value), tensor)
