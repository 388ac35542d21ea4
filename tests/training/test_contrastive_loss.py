"""The contrastive loss: values worked out by hand, a plain NumPy loop, and eight devices."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import child
from training import contrastive_loss
from training.contrastive_loss import Embeddings, Labels, Rules

contrastive = jax.jit(contrastive_loss.contrastive, static_argnames=("rules", "mesh"))
NAN = float("nan")


def labels(rows: int, positives: int = 1, negatives: int = 0, **changes: Any) -> Labels:
    """All different, all there, no scores."""
    key = np.arange(1, rows * (positives + negatives) + 1, dtype=np.uint32)
    keys = np.stack([key, key + 7], 1).reshape(rows, positives + negatives, 2)
    made = Labels(
        weight=np.ones(rows, np.float32),
        group=np.zeros((rows, 2), np.uint32),
        positive_key=keys[:, :positives],
        positive_mask=np.ones((rows, positives), bool),
        negative_key=keys[:, positives:],
        negative_mask=np.ones((rows, negatives), bool),
        positive_score=np.full(rows, NAN, np.float32),
        negative_score=np.full((rows, negatives), NAN, np.float32),
    )
    return replace(made, **changes)


def random_case(seed: int, rows: int, p: int, k: int, size: int = 8) -> tuple[Embeddings, Labels]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    known = labels(rows, p, k)
    positive_key = known.positive_key.copy()
    positive_key[3, 0] = positive_key[0, 0]  # a duplicate document
    negative_key = known.negative_key.copy()
    negative_key[2, :1] = positive_key[2, 0]  # a mined negative that is the positive
    group = known.group.copy()
    group[[1, 5]] = (9, 9)
    mask = rng.random((rows, p)) < 0.7
    mask[:, 0] = True
    known = replace(
        known,
        group=group,
        weight=np.where(np.arange(rows) == rows - 1, 0, 1).astype(np.float32),
        positive_key=positive_key,
        positive_mask=mask,
        negative_key=negative_key,
        negative_mask=rng.random((rows, k)) < 0.8,
        positive_score=np.where(np.arange(rows) % 3, rng.random(rows), NAN).astype(np.float32),
        negative_score=np.where(rng.random((rows, k)) < 0.8, rng.random((rows, k)), NAN).astype(
            np.float32
        ),
    )
    return Embeddings(queries=draw(rows, size), positives=draw(rows, p, size),
                      negatives=draw(rows, k, size)), known  # fmt: skip


def reference(z: Embeddings, known: Labels, scale: float, rules: Rules) -> float:
    """The docstring's formula, one term after another, in float64."""

    def unit(x: np.ndarray, n: int) -> np.ndarray:
        x = np.asarray(x, np.float64)[..., :n]
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def same(i: int, key: np.ndarray) -> bool:
        there = known.positive_mask[i]
        return any((k == key).all() for k, m in zip(known.positive_key[i], there, strict=True) if m)

    def grouped(i: int, j: int) -> bool:
        return known.group[i].any() and bool((known.group[i] == known.group[j]).all())

    rows, p = known.positive_mask.shape
    sizes = (z.queries.shape[1], *rules.dimensions)
    total = 0.0
    for n in sizes:
        q, d, h = unit(z.queries, n), unit(z.positives, n), unit(z.negatives, n)
        real = [i for i in range(rows) if known.weight[i]]
        best = {i: max(q[i] @ d[i, a] for a in range(p) if known.positive_mask[i, a]) for i in real}
        above = {i: math.inf if rules.margin is None else best[i] + rules.margin for i in real}
        for i in real:
            others = []
            for j in real:
                if j == i:
                    continue
                for a in range(p):
                    s = q[i] @ d[j, a]
                    out = same(i, known.positive_key[j, a]) or grouped(i, j) or s > above[i]
                    if known.positive_mask[j, a] and not out:
                        others.append(s)
                for b in range(h.shape[1] if rules.share_negatives else 0):
                    s = q[i] @ h[j, b]
                    if known.negative_mask[j, b] and not (
                        same(i, known.negative_key[j, b]) or s > above[i]
                    ):
                        others.append(s)
            for b in range(h.shape[1]):
                s = q[i] @ h[i, b]
                teacher = rules.teacher_threshold is not None and (
                    known.negative_score[i, b] >= rules.teacher_threshold * known.positive_score[i]
                )
                if known.negative_mask[i, b] and not (
                    same(i, known.negative_key[i, b]) or s > above[i] or teacher
                ):
                    others.append(s)
            rest = sum(math.exp(scale * s) for s in others)
            terms = []
            for a in range(p):
                if known.positive_mask[i, a]:
                    e = math.exp(scale * (q[i] @ d[i, a]))
                    terms.append(-math.log(e / (e + rest)))
            loss = float(np.mean(terms))
            scored = [
                b for b in range(h.shape[1])
                if known.negative_mask[i, b] and not math.isnan(known.negative_score[i, b])
            ]  # fmt: skip
            if rules.soft_weight and scored and not math.isnan(known.positive_score[i]):
                chance = np.array([known.positive_score[i], *known.negative_score[i, scored]])
                t = (chance / (1 - chance)) ** (1 / rules.soft_temperature)
                s = np.exp(scale * np.array([q[i] @ d[i, 0], *(h[i, scored] @ q[i])]))
                t, s = t / t.sum(), s / s.sum()
                soft = float((t * np.log(t / s)).sum())
                loss = (1 - rules.soft_weight) * loss + rules.soft_weight * soft
            if rules.symmetric:
                terms = []
                for a in range(p):
                    if not known.positive_mask[i, a]:
                        continue
                    rest = sum(
                        math.exp(scale * (q[j] @ d[i, a]))
                        for j in real
                        if j != i
                        and not same(j, known.positive_key[i, a])
                        and not grouped(i, j)
                        and not q[j] @ d[i, a] > above[j]
                    )
                    e = math.exp(scale * (q[i] @ d[i, a]))
                    terms.append(-math.log(e / (e + rest)))
                loss = 0.5 * (loss + float(np.mean(terms)))
            total += loss / len(real)
    return total / len(sizes)


def test_two_queries_by_hand() -> None:
    """Cosines 1 and 0.6; scale 2: -log(e^2 / (e^2 + e^1.2)) for the first."""
    z = Embeddings(
        queries=np.array([[2.0, 0], [0, 3.0]], np.float32),
        positives=np.array([[[5.0, 0]], [[0.6, 0.8]]], np.float32),
        negatives=np.zeros((2, 0, 2), np.float32),
    )
    loss, metrics = contrastive(z, labels(2), jnp.float32(2.0), rules=Rules())
    first = -math.log(math.exp(2) / (math.exp(2) + math.exp(1.2)))
    second = -math.log(math.exp(1.6) / (math.exp(1.6) + math.exp(0)))
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)
    assert float(metrics["hit"]) == 1.0
    assert float(metrics["positive"]) == pytest.approx(0.9)
    assert float(metrics["negative"]) == pytest.approx(0.3)


def test_an_own_negative_is_in_its_query_s_denominator_only() -> None:
    z = Embeddings(
        queries=np.eye(2, dtype=np.float32),
        positives=np.eye(2, dtype=np.float32)[:, None],
        negatives=np.array([[[0.8, 0.6]], [[1.0, 0.0]]], np.float32),
    )
    known = labels(2, 1, 1, negative_mask=np.array([[True], [False]]))
    loss, metrics = contrastive(z, known, jnp.float32(1.0), rules=Rules())
    first = -math.log(math.e / (math.e + 1 + math.exp(0.8)))
    second = -math.log(math.e / (math.e + 1))
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)
    assert float(metrics["hardness"]) == pytest.approx(-0.2, abs=1e-6)
    shared, _ = contrastive(z, known, jnp.float32(1.0), rules=Rules(share_negatives=True))
    second = -math.log(math.e / (math.e + 1 + math.exp(0.6)))
    assert float(shared) == pytest.approx((first + second) / 2, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"positive_key": np.ones((2, 1, 2), np.uint32)},
        {"group": np.full((2, 2), 5, np.uint32)},
    ],
    ids=["same document", "same group"],
)
def test_a_false_negative_leaves_nothing_to_learn(changes: dict[str, Any]) -> None:
    z, _ = random_case(0, 6, 1, 0)
    z = jax.tree.map(lambda x: x[:2], z)
    for rules in (Rules(), Rules(symmetric=True)):
        loss, metrics = contrastive(z, labels(2, **changes), jnp.float32(9.0), rules=rules)
        assert float(loss) == 0.0
        assert float(metrics["masked"]) == 1.0


def test_the_margin_spares_what_is_closer_than_the_positive() -> None:
    z = Embeddings(
        queries=np.array([[1.0, 0], [0, 1]], np.float32),
        positives=np.array([[[0.6, 0.8]], [[0.8, 0.6]]], np.float32),
        negatives=np.zeros((2, 0, 2), np.float32),
    )
    for margin, masked in ((0.1, 1.0), (0.3, 0.0)):  # s_ij = 0.8 against 0.6
        _, metrics = contrastive(z, labels(2), jnp.float32(1.0), rules=Rules(margin=margin))
        assert float(metrics["masked"]) == masked


EVERY_RULE = {
    "plain": Rules(),
    "symmetric": Rules(symmetric=True, margin=0.1),
    "shared": Rules(share_negatives=True, margin=0.2),
    "matryoshka": Rules(dimensions=(4, 2), teacher_threshold=0.9),
    "soft": Rules(soft_weight=0.4, soft_temperature=2.0),
    "all": Rules(
        symmetric=True,
        share_negatives=True,
        dimensions=(4,),
        margin=0.3,
        teacher_threshold=0.95,
        soft_weight=0.3,
    ),
}
EVERY_RULE["blocks"] = replace(EVERY_RULE["all"], rows=1)


@pytest.mark.parametrize("name", EVERY_RULE)
def test_the_loss_is_the_formula(name: str) -> None:
    rules = EVERY_RULE[name]
    z, known = random_case(1, 8, 2, 3)
    loss, _ = contrastive(z, known, jnp.float32(5.0), rules=rules)
    assert float(loss) == pytest.approx(reference(z, known, 5.0, rules), rel=2e-6)


def gradients(
    z: Embeddings, known: Labels, rules: Rules, mesh: Any = None
) -> tuple[Any, dict[str, Any], Any]:
    run = jax.jit(
        jax.value_and_grad(
            lambda z, scale, known: contrastive(z, known, scale, rules=rules, mesh=mesh),
            argnums=(0, 1),
            has_aux=True,
        )
    )
    (loss, metrics), grads = run(z, jnp.float32(5.0), known)
    return loss, metrics, grads


@pytest.mark.parametrize("name", ["plain", "all"])
def test_blocks_of_rows_change_nothing(name: str) -> None:
    z, known = random_case(2, 8, 2, 3)
    whole = gradients(z, known, EVERY_RULE[name])
    parts = gradients(z, known, replace(EVERY_RULE[name], rows=2))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    z, known = random_case(3, 6, 2, 2)
    rules = EVERY_RULE["all"]
    _, _, (grads, d_scale) = gradients(z, known, rules)
    for name, at in (("queries", (1, 3)), ("positives", (0, 0, 2)), ("negatives", (4, 1, 5))):
        step = 1e-4
        sides = []
        for sign in (1, -1):
            moved = np.asarray(getattr(z, name), np.float64).copy()
            moved[at] += sign * step
            sides.append(reference(replace(z, **{name: moved}), known, 5.0, rules))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert float(getattr(grads, name)[at]) == pytest.approx(slope, abs=2e-6)
    slope = (reference(z, known, 5.0 + 1e-4, rules) - reference(z, known, 5.0 - 1e-4, rules)) / 2e-4
    assert float(d_scale) == pytest.approx(slope, abs=2e-6)


ON_MESHES = ("plain", "blocks")  # the second has every collective there is


def eight_devices(out: str) -> None:
    """In a child with eight devices: values and gradients of every rule on three meshes."""
    from tte_jax import sharding

    found = {}
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tp": 2}):
        mesh = sharding.make_mesh(**sizes)
        z, known = random_case(4, 16, 2, 3)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        z, known = jax.device_put((z, known), place)
        for name in ON_MESHES:
            rules = EVERY_RULE[name]
            with jax.set_mesh(mesh):
                leaves = jax.tree.leaves(gradients(z, known, rules, mesh))
            for i, leaf in enumerate(leaves):
                found[f"{'x'.join(map(str, sizes.values()))}/{name}/{i}"] = np.asarray(leaf)
    np.savez(out, **found)


@pytest.mark.many_devices
def test_eight_devices_say_what_one_says(tmp_path: Path) -> None:
    out = tmp_path / "found.npz"
    child.run("tests.training.test_contrastive_loss", "eight_devices", str(out), devices=8)
    there = np.load(out)
    z, known = random_case(4, 16, 2, 3)
    for name in ON_MESHES:
        here = jax.tree.leaves(gradients(z, known, EVERY_RULE[name]))
        assert len(here) > 8
        for mesh in ("8", "2x2x2"):
            for i, leaf in enumerate(here):
                np.testing.assert_allclose(
                    there[f"{mesh}/{name}/{i}"], leaf, rtol=0, atol=2e-6, err_msg=f"{mesh} {name}"
                )
