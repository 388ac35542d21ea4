"""Reasoner SFT: what is learnt, the loss against transformers, and runs in two parts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests import tiny_models
from tests.training import pairs_file
from training import batches, sft
from training.batches import Packing
from training.data.jsonl import JsonlSource
from training.parameters import Tuning
from training.sequences import Sequences
from tte_jax.content import Side
from tte_jax.errors import InvalidInputError
from tte_jax.preprocess.prompts import PromptSet
from tte_jax.weights import hf

pytestmark = pytest.mark.training_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sft")
    pairs_file.write(root)
    tiny_models.write_model(root / "model", family="qwen3", roles=["reasoner"], scale=3.0)
    return root


def config(folder: Path, out: str) -> sft.Config:
    shared = pairs_file.config(folder / "model", folder / "pairs.jsonl", folder / out)
    return sft.Config(
        model=shared.model,
        data=shared.data,
        out=shared.out,
        steps=4,
        global_batch=8,
        sub_batch=8,
        packing=shared.packing,
        tuning=Tuning("full"),
        optimiser=replace(shared.optimiser, lr=3e-3),
        dtype="float32",
        remat=False,
        report_every=1,
        checkpoint_every=2,
    )


def test_only_the_reasoning_is_learnt(folder: Path) -> None:
    model = hf.load(folder / "model")
    prompts = PromptSet.from_dir(folder / "model")
    sequences = Sequences(prompts, model.config, longest=64)
    example = JsonlSource(folder / "pairs.jsonl")[0]
    item = sequences.reasoning(example.query, Side.QUERY)
    assert item.learnt is not None
    text = prompts.tokenizer.decode(item.input.ids[1:][item.learnt[:-1] > 0])
    assert text.replace("<|im_end|>", "") == example.query.ecr
    assert item.learnt[-1] == 0, "nothing follows the end of the turn"
    with pytest.raises(InvalidInputError, match="no ECR"):
        sequences.reasoning(example.positives[0], Side.DOCUMENT)
    short = Sequences(prompts, model.config, longest=item.input.tokens - 4)
    cut = short.reasoning(example.query, Side.QUERY)
    assert cut.input.tokens == item.input.tokens - 4
    with pytest.raises(InvalidInputError, match="the prompt takes"):
        Sequences(prompts, model.config, longest=8).reasoning(example.query, Side.QUERY)


def test_the_loss_is_that_of_transformers(folder: Path) -> None:
    """Each sequence by itself there, all packed here."""
    from transformers import Qwen3ForCausalLM

    model = hf.load(folder / "model")
    prompts = PromptSet.from_dir(folder / "model")
    sequences = Sequences(prompts, model.config, longest=64)
    source = JsonlSource(folder / "pairs.jsonl")
    items = [sequences.reasoning(source[i].query, Side.QUERY) for i in range(5)]
    packing = Packing(lengths=(128,), tokens=256, slots=4, patches=16)
    made, _ = batches.pack([items], packing, model.config, nowhere=0, text=True)
    run = jax.jit(partial(sft.next_token_loss, remat=False, rows=64))
    ours = sum(float(run(model, part)[0]) for (part,) in made)
    theirs = Qwen3ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    expected = 0.0
    for item in items:
        assert item.learnt is not None
        ids = torch.from_numpy(item.input.ids.astype(np.int64))[None]
        with torch.no_grad():
            nll = -theirs(ids).logits[0].log_softmax(-1)
        at = np.flatnonzero(item.learnt)
        expected += float(nll[at, ids[0, at + 1]].sum())
    assert ours == pytest.approx(expected, rel=1e-5)


def test_data_without_ecrs_are_refused_and_a_step_without_them_changes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    settings = config(folder, "few")
    with pytest.raises(InvalidInputError, match="of animals has an ECR for a positive"):
        sft.main(replace(settings, sides="document"))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["query"]["ecr"] = row["query"]["ecr"] if number == 0 else ""

    def data(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"jsonl:{tmp_path / name}"

    few = replace(settings, data=(data("few.jsonl", rows),), steps=2, out=tmp_path / "run")
    with pytest.raises(InvalidInputError, match="none of the first 15 examples of jsonl:.*none"):
        sft.main(replace(few, eval=data("none.jsonl", rows[1:])))
    assert sft.main(few) is not None
    told = [json.loads(x) for x in (few.out / "metrics.jsonl").read_text().splitlines()]
    # Of two batches of eight, one has the only ECR.
    assert sorted(row["tokens"] > 0 for row in told) == [False, True]
    assert [row["loss"] for row in told if not row["tokens"]] == [0.0]


def test_a_run_in_two_parts_is_the_same_run(folder: Path) -> None:
    whole = config(folder, "whole")
    assert sft.main(replace(whole, eval=whole.data[0])) == whole.out / "export"
    parts = replace(config(folder, "parts"), eval=whole.data[0])
    assert sft.main(replace(parts, until=2)) is None
    sft.main(parts)
    ours, theirs = (load_file(c.out / "export" / "model.safetensors") for c in (whole, parts))
    before = load_file(folder / "model" / "model.safetensors")
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert any(np.abs(value - before[name]).max() > 1e-3 for name, value in ours.items())
    found = [json.loads(x) for x in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["eval/loss"] < found[0]["loss"]
    assert {"right", "tokens", "pad_share", "tflops"} <= found[0].keys()
