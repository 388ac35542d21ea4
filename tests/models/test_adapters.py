"""LoRA and DoRA directories written by PEFT, against PEFT's own answers with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tte_jax
from tests.models.conftest import Checkpoint, images_batch, text_batch
from tte_jax.errors import DataLossError, InvalidInputError, NotFoundError, PreconditionError
from tte_jax.weights import adapter as adapters
from tte_jax.weights import hf

VLM2VEC = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "v_proj"]
# family, tied → settings of the adapter
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "as VLM2Vec": ("qwen2_vl", True, {"r": 8, "lora_alpha": 64, "target_modules": VLM2VEC}),
    "the tower, its convolution too": (
        "qwen2_vl",
        False,
        {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "proj", "fc1", "mlp.2"]},
    ),
    "DoRA on decoder and tower": (
        "qwen2_5_vl",
        True,
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["gate_proj", "o_proj"]},
    ),
    "rsLoRA on everything": (
        "qwen3_vl",
        True,
        {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    ),
    "DoRA by expression, head too": (
        "qwen3",
        False,
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": r".*\.mlp\..*_proj|lm_head"},
    ),
    "patterns and chosen layers": (
        "qwen2",
        False,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "layers_to_transform": [1],
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3},
        },
    ),
}
Trained = tuple[PeftModel, Path, Path]


@pytest.fixture(scope="module")
def trained(
    saved: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """(PEFT's model, directory of its base, directory of the adapter) of a case."""
    made: dict[str, Trained] = {}

    def get(case: str) -> Trained:
        if case not in made:
            family, tied, settings = CASES[case]
            base = saved(family, tied=tied)
            model = type(base.model).from_pretrained(base.path)
            model = get_peft_model(model, LoraConfig(**settings))
            generator = torch.Generator().manual_seed(7)
            for name, parameter in model.named_parameters():
                if "lora_" in name:  # fresh adapters change nothing: their B is zero
                    noise = torch.randn(parameter.shape, generator=generator)
                    around = parameter.data if "magnitude" in name else 0
                    parameter.data.copy_(around + 0.1 * noise)
            path = tmp_path_factory.mktemp("adapter")
            model.eval().save_pretrained(path)
            made[case] = model, base.path, path
        return made[case]

    return get


def batch_of(family: str) -> dict[str, np.ndarray]:
    return images_batch("right") if family.endswith("vl") else text_batch("right")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(
    saved: Callable[..., Checkpoint], trained: Callable[[str], Trained], case: str
) -> None:
    family, tied, _ = CASES[case]
    model, base, path = trained(case)
    batch = batch_of(family)
    real = batch["attention_mask"] > 0
    expected, _ = Checkpoint(path, model.base_model.model).answers(batch)
    plain, _ = saved(family, tied=tied).answers(batch)
    assert np.abs(expected - plain)[real].max() > 0.5, "the adapter changes the answers"
    ours = tte_jax.load_model(base, adapter=path)(**batch).logits
    np.testing.assert_allclose(ours[real], expected[real], rtol=0, atol=1e-4)


def test_the_directory_of_an_adapter_is_a_model(trained: Callable[[str], Trained]) -> None:
    _, base, path = trained("as VLM2Vec")
    assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    batch = text_batch("right")
    alone, given = tte_jax.load_model(path), tte_jax.load_model(base, adapter=path)
    np.testing.assert_array_equal(alone(**batch).logits, given(**batch).logits)
    with pytest.raises(InvalidInputError, match="adapter itself"):
        tte_jax.load_model(path, adapter=path)


@pytest.mark.parametrize("case", ["DoRA on decoder and tower", "rsLoRA on everything"])
def test_the_merged_model_is_read_by_the_reference(
    trained: Callable[[str], Trained], tmp_path: Path, case: str
) -> None:
    family, _, _ = CASES[case]
    model, base, path = trained(case)
    hf.export(tte_jax.load_model(base, adapter=path).module, tmp_path)
    shutil.copy(base / "config.json", tmp_path)
    kind = type(model.base_model.model)
    again, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = batch_of(family)
    real = batch["attention_mask"] > 0
    expected, _ = Checkpoint(path, model.base_model.model).answers(batch)
    merged, _ = Checkpoint(tmp_path, again.eval()).answers(batch)
    np.testing.assert_allclose(merged[real], expected[real], rtol=0, atol=1e-4)


def test_an_adapter_is_written_as_it_was_read(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    model, base, path = trained("DoRA on decoder and tower")
    adapters.save(adapters.read(path), tmp_path)
    before, after = (load_file(p / adapters.WEIGHTS) for p in (path, tmp_path))
    assert before.keys() == after.keys() and len(before) > 10
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype
    assert adapters.settings(tmp_path) == adapters.settings(path)
    again = PeftModel.from_pretrained(type(model.base_model.model).from_pretrained(base), tmp_path)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_half_precision_is_merged_in_float32(trained: Callable[[str], Trained]) -> None:
    _, base, path = trained("as VLM2Vec")
    exact = tte_jax.load_model(base, adapter=path).module.text.layers.q_dnh.get_value()
    rough = tte_jax.load_model(base, adapter=path, dtype="bfloat16").module
    q = rough.text.layers.q_dnh.get_value()
    assert q.dtype == "bfloat16"
    # Twice rounded: the base weight on reading, the sum at the end; each by 2^-9 of its size.
    error = np.abs(np.asarray(q, np.float32) - np.asarray(exact))
    assert error.max() <= 2**-8 * np.abs(exact).max()


@pytest.fixture
def copy(trained: Callable[[str], Trained], tmp_path: Path) -> tuple[Path, Path]:
    _, base, path = trained("patterns and chosen layers")
    return base, Path(shutil.copytree(path, tmp_path / "adapter"))


def edit(path: Path, **changes: Any) -> None:
    file = path / adapters.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_every_fault_of_the_tensors_is_reported_at_once(copy: tuple[Path, Path]) -> None:
    base, path = copy
    tensors = load_file(path / adapters.WEIGHTS)
    layer = "base_model.model.model.layers.1."
    del tensors[layer + "self_attn.q_proj.lora_A.weight"]
    del tensors[layer + "self_attn.v_proj.lora_A.weight"]
    del tensors[layer + "self_attn.v_proj.lora_B.weight"]
    tensors[layer + "mlp.up_proj.lora_B.weight"] = torch.zeros(96, 3)
    tensors[layer + "mlp.up_proj.lora_magnitude_vector"] = torch.zeros(96)
    tensors[layer + "self_attn.o_proj.lora_A.weight"] = torch.zeros(4, 64)
    tensors[layer + "self_attn.o_proj.lora_B.weight"] = torch.zeros(64, 4)
    tensors[layer + "self_attn.w_proj.lora_A.weight"] = torch.zeros(4, 64)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, path / adapters.WEIGHTS)
    with pytest.raises(PreconditionError) as caught:
        tte_jax.load_model(base, adapter=path)
    message = str(caught.value)
    for fault in (
        "missing: model.layers.1.self_attn.q_proj.lora_A.weight",
        "missing: model.layers.1.self_attn.v_proj is among the target_modules",
        "shape: model.layers.1.mlp.up_proj.lora_B.weight is [96, 3], expected [96, 2]",
        "unexpected: model.layers.1.mlp.up_proj.lora_magnitude_vector (use_dora is not set)",
        "unexpected: model.layers.1.self_attn.o_proj is not among the target_modules",
        "unexpected: model.layers.1.self_attn.w_proj is no linear layer",
        "unexpected: base_model.model.lm_head.weight [2, 2]",
    ):
        assert fault in message, fault
    assert "7 problems" in message


def test_settings_that_would_be_computed_wrongly_are_refused(copy: tuple[Path, Path]) -> None:
    base, path = copy
    edit(path, bias="all", modules_to_save=["lm_head"], init_lora_weights="pissa", use_new=True)
    with pytest.raises(PreconditionError) as caught:
        tte_jax.load_model(base, adapter=path)
    for word in ("bias is 'all'", "modules_to_save", "pissa", "use_new", "4 problems"):
        assert word in str(caught.value)
    edit(path, peft_type="IA3", r=0)
    with pytest.raises(PreconditionError, match=r"'IA3'[\s\S]*r is 0"):
        tte_jax.load_model(base, adapter=path)


def test_an_adapter_of_another_model(
    saved: Callable[..., Checkpoint], copy: tuple[Path, Path]
) -> None:
    _, path = copy
    with pytest.raises(PreconditionError, match=r"does not fit the qwen3 model[\s\S]*shape: "):
        tte_jax.load_model(saved("qwen3", tied=True).path, adapter=path)


def test_the_head_of_a_tied_model_is_refused(
    saved: Callable[..., Checkpoint], copy: tuple[Path, Path]
) -> None:
    _, path = copy
    edit(path, target_modules=["lm_head"], layers_to_transform=None)
    head = "base_model.model.lm_head.lora_"
    tensors = {head + "A.weight": torch.zeros(4, 64), head + "B.weight": torch.zeros(160, 4)}
    save_file(tensors, path / adapters.WEIGHTS)
    with pytest.raises(PreconditionError, match="embedding table"):
        tte_jax.load_model(saved("qwen2", tied=True).path, adapter=path)


def test_absent_and_damaged_adapters(copy: tuple[Path, Path], tmp_path: Path) -> None:
    base, path = copy
    with pytest.raises(NotFoundError, match="nowhere"):
        tte_jax.load_model(base, adapter=tmp_path / "nowhere")
    edit(path, base_model_name_or_path=None)
    with pytest.raises(PreconditionError, match="base_model_name_or_path"):
        tte_jax.load_model(path)
    edit(path, base_model_name_or_path=str(path))
    with pytest.raises(PreconditionError, match="merge that one first"):
        tte_jax.load_model(path)
    whole = (path / adapters.WEIGHTS).read_bytes()
    (path / adapters.WEIGHTS).write_bytes(whole[:50])
    with pytest.raises(DataLossError, match="damaged"):
        tte_jax.load_model(base, adapter=path)
    (path / adapters.WEIGHTS).unlink()
    with pytest.raises(NotFoundError, match="adapter_model.bin"):
        tte_jax.load_model(base, adapter=path)
    (path / adapters.CONFIG).write_text("[]")
    with pytest.raises(DataLossError, match="list"):
        tte_jax.load_model(path)
