"""Packing and the host's side of a step: nothing here needs a device."""

from __future__ import annotations

import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny_models
from tests.training.packed_items import inputs
from training import batches, results
from training.batches import Item, Packing
from training.data.examples import Document, Example
from training.sequences import (
    Counts,
    Sequences,
    embedding_items,
    hashed,
    labels_of,
    reasoning_items,
    shorter,
    without_ecr,
)
from training.stopping import StopRequest
from training.telemetry import Telemetry
from tte_jax.content import Content, Side
from tte_jax.errors import InternalError, InvalidInputError
from tte_jax.models.registry import model_config
from tte_jax.preprocess.prompts import PromptSet

PACKING = Packing(lengths=(8, 16), tokens=32, slots=3, patches=16)


def test_every_shard_gets_the_same_shapes_and_loses_nothing() -> None:
    config = model_config(tiny_models.vl_dir())
    shards = [[Item(one, i) for i, one in enumerate(inputs(config, n, seed=n))] for n in (7, 2, 12)]
    made, fill = batches.pack(shards, PACKING, config, nowhere=12)
    for parts in made:
        assert len(parts) == 3
        for name in ("ids", "positions", "sequence", "ends", "dest", "patches", "vis_idx"):
            shapes = {None if x is None else x.shape for x in (getattr(p, name) for p in parts)}
            assert len(shapes) == 1, name
        assert parts[0].targets is None
    for number, items in enumerate(shards):
        found = np.concatenate([parts[number].dest.ravel() for parts in made])
        assert sorted(found[found < 12]) == list(range(len(items)))
    every = [item.input for items in shards for item in items]
    assert fill.tokens == sum(i.tokens for i in every)
    assert fill.squares == sum(i.tokens**2 for i in every)
    assert fill.patches == sum(len(x.patches) for i in every for x in i.images)
    assert fill.places == sum(p.ids.size for parts in made for p in parts)
    assert fill.patch_places == sum(
        p.patches.shape[0] * p.patches.shape[1]
        for parts in made
        for p in parts
        if p.patches is not None
    )


def test_a_row_holds_its_sequences_end_to_end() -> None:
    config = model_config(tiny_models.vl_dir())
    every = inputs(config, 9, seed=1)
    made, _ = batches.pack(
        [[Item(one, i) for i, one in enumerate(every)]], PACKING, config, nowhere=9
    )
    seen = 0
    for (part,) in made:
        for r, s in np.argwhere(part.dest < 9):
            one = every[part.dest[r, s]]
            end = part.ends[r, s] + 1
            place = slice(end - one.tokens, end)
            np.testing.assert_array_equal(part.ids[r, place], one.ids)
            np.testing.assert_array_equal(part.positions[r, :, place], one.positions)
            assert set(part.sequence[r, place]) == {s + 1}
            if one.images:
                rows = part.vis_idx[r, place][one.is_media]
                table = part.patches.reshape(-1, 4, part.patches.shape[-1])[rows]
                wanted = np.concatenate([i.patches for i in one.images])
                np.testing.assert_array_equal(table.reshape(wanted.shape), wanted)
            seen += 1
    assert seen == 9


def test_shards_look_into_their_own_part_of_the_features() -> None:
    config = model_config(tiny_models.vl_dir())
    shards = [[Item(one, i) for i, one in enumerate(inputs(config, 6, seed=s))] for s in (1, 2)]
    made, _ = batches.pack(shards, PACKING, config, nowhere=6)
    with_images = [parts for parts in made if parts[0].patches is not None]
    assert with_images
    for parts in with_images:
        features = parts[0].patches.shape[0] * PACKING.patches // 4
        moved = batches._shifted(parts[1], features).vis_idx
        before = parts[1].vis_idx
        np.testing.assert_array_equal(moved < 0, before < 0)
        np.testing.assert_array_equal(moved[moved >= 0], before[before >= 0] + features)


def test_other_processes_may_need_more() -> None:
    """What another process needs becomes padding here."""
    config = model_config(tiny_models.text_dir())
    items = [[Item(one, i) for i, one in enumerate(inputs(config, 3, longest=8))]]
    alone, _ = batches.pack(items, PACKING, config, nowhere=3)
    more, fill = batches.pack(items, PACKING, config, nowhere=3, agree=lambda x: x + 5)  # rows
    assert len(more) > len(alone)
    assert fill.tokens == sum(item.input.tokens for item in items[0])
    assert sum(int((part.dest < 3).sum()) for (part,) in more) == 3


def test_a_sequence_beyond_the_ladder() -> None:
    config = model_config(tiny_models.text_dir())
    (long,) = inputs(config, 1, longest=20, seed=8)
    with pytest.raises(InvalidInputError, match="at most 4"):
        batches.pack([[Item(long, 0)]], replace(PACKING, lengths=(4,)), config, nowhere=1)


def example(name: str, **changes: object) -> Example:
    def document(text: str, ecr: str = "") -> Document:
        return Document(text, Content.of(text), ecr=ecr)

    made = Example(
        key=name,
        dataset="d",
        query=document(name, "<think>one two</think>\nAnswer: three"),
        positives=(document(f"{name} yes"), document(f"{name} too", "Answer: it")),
        negatives=(document(f"{name} no"),),
        negative_scores=(0.25,),
        positive_score=0.75,
    )
    return replace(made, **changes)


def test_labels_say_what_the_example_says() -> None:
    made = labels_of([example("a", group="g"), example("b", negatives=())], Counts(2, 2))
    assert made.positive_mask.all()
    np.testing.assert_array_equal(made.negative_mask, [[True, False], [False, False]])
    assert tuple(made.positive_key[0, 0]) == hashed("a yes")
    assert made.group[0].any() and not made.group[1].any()
    other = labels_of([example("a", group="g", dataset="e")], Counts())
    assert not (other.group[0] == made.group[0]).all(), "groups are of one data set"
    assert made.negative_score[0, 0] == 0.25 and np.isnan(made.negative_score[0, 1])
    np.testing.assert_array_equal(made.positive_score, [0.75, 0.75])
    bare = labels_of([example("a", positive_score=None)], Counts())
    assert np.isnan(bare.positive_score[0]) and bare.negative_key.shape == (1, 0, 2)


def sequences(longest: int) -> Sequences:
    path = tiny_models.text_dir()
    return Sequences(PromptSet.from_dir(path), model_config(path), longest=longest)


def test_vectors_go_where_the_loss_looks_for_them() -> None:
    with ThreadPoolExecutor(2) as pool:
        items = embedding_items(
            [example("a"), example("b", positives=example("b").positives[:1])],
            Counts(2, 1),
            sequences(64),
            pool,
        )
        learnt = reasoning_items([example("a"), example("a")], "both", sequences(64), pool)
        twice = replace(example("a"), positives=example("a").positives * 2)
        once = reasoning_items([twice], "both", sequences(64), pool)
    # b = 2 queries, then 2 x 2 positives, then 2 x 1 negatives; b has one positive only.
    assert sorted(item.dest for item in items) == [0, 1, 2, 3, 4, 6, 7]
    assert len(learnt) == 4, "of both the query and the one document that has an ECR"
    assert len(once) == 2, "a document that stands twice in an example is learnt once"


def test_a_long_sequence_loses_its_ecr_first() -> None:
    words = " ".join(["smile"] * 60)
    document = Document("k", Content.of("a cat"), ecr=words)
    one = sequences(40).embedding(document, Side.QUERY)
    whole = sequences(400).embedding(document, Side.QUERY)
    bare = sequences(400).embedding(replace(document, ecr=""), Side.QUERY)
    assert bare.tokens < one.tokens <= 40 < whole.tokens
    assert one.ids[-1] == whole.ids[-1], "the end of the turn, which is pooled, stays"
    text = Document("k", Content.of(words))
    assert sequences(40).embedding(text, Side.QUERY).tokens <= 40
    # Written without spaces: characters go, of the ECR first.
    chinese = Document("k", Content.of("猫" * 200), ecr="狗" * 200)
    one = sequences(100).embedding(chinese, Side.QUERY)
    assert 60 < one.tokens <= 100
    cut = shorter(chinese, 0.5, 40)
    assert cut.ecr == "狗" * 90 and cut.content == chinese.content
    with pytest.raises(InvalidInputError, match="without any text"):
        shorter(Document("k", Content.of("", tiny_models.png(0))), 0.5, 40)


def test_leaving_out_ecrs_is_a_function_of_the_seed() -> None:
    made = [without_ecr(example("a"), 0.5, (1, 2, i)) for i in range(40)]
    again = [without_ecr(example("a"), 0.5, (1, 2, i)) for i in range(40)]
    assert made == again
    shown = sum(bool(e.query.ecr) for e in made)
    assert 8 < shown < 32
    assert without_ecr(example("a"), 0.0, (0,)) == example("a")


def test_ranks_in_the_pool() -> None:
    """Three pairs of which two share a document: a pool of two."""
    queries = np.array([[1.0, 0], [0, 1], [1, 0.1]])
    documents = np.array([[2.0, 0], [0.9, 1], [2, 0]])
    found = results.retrieval(queries, documents, ["x", "y", "x"])
    assert found == {"hit1": 1.0, "hit10": 1.0, "mrr": 1.0}
    # Vectors that have all become one, or no numbers, have found nothing.
    keys = [str(i) for i in range(12)]
    for value in (1.0, 0.0, np.nan):
        same = np.full((12, 3), value)
        found = results.retrieval(same, same, keys)
        assert found["hit1"] == found["hit10"] == 0.0, value
    found = results.retrieval(queries, documents, ["y", "x", "x"])  # the last is nearer to y
    assert found == {"hit1": 2 / 3, "hit10": 1.0, "mrr": pytest.approx(5 / 6)}


@dataclass(frozen=True)
class Device:
    """As a TPU's: JAX numbers them along the torus."""

    process_index: int
    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def test_the_devices_of_a_process_stand_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two rows of two hosts, each with four chips: as coordinates go, hosts alternate.
    there = [Device(2 * (i // 8) + i % 4 // 2, i) for i in range(16)]
    monkeypatch.setattr(jax, "devices", lambda: there)
    mesh = batches.mesh_of({"data": 4, "fsdp": 4, "tp": 1})
    processes = [d.process_index for d in mesh.devices.reshape(-1)]
    assert processes == sorted(processes) and mesh.axis_names == ("data", "fsdp", "tp")
    with pytest.raises(InvalidInputError, match="needs 8 devices, but there are 16"):
        batches.mesh_of({"data": 4, "fsdp": 2, "tp": 1})


def test_rows_of_a_killed_run_do_not_stand_twice(tmp_path: Path) -> None:
    first = Telemetry(tmp_path, steps=4)
    for step in (1, 2, 3):
        first.report(step, {"loss": 1.0 / step, "eval/hit1": 0.5})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 4, "lo')
    again = Telemetry(tmp_path, steps=4, first=2)
    again.report(3, {"loss": 7.0})
    with pytest.raises(InternalError, match="not finite|nan"):
        again.report(4, {"loss": math.nan})
    again.close()
    last = Telemetry(tmp_path, steps=5, first=4)
    with pytest.raises(InternalError, match="norm of the gradient is inf at step 5"):
        last.report(5, {"loss": 1.0, "grad_norm": math.inf})
    last.close()
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1]["eval/hit1"] == 0.5 and rows[2]["loss"] == 7.0


def test_a_signal_is_remembered_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() and stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before, "a second one ends the process"
    assert signal.getsignal(signal.SIGTERM) == before
