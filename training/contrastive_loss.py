"""The contrastive loss over global in-batch negatives: pure functions, exact on any mesh.

For query i with positives p, in-batch documents j and its own mined negatives k

    loss_i = mean over p of  -log( e^{s_ip/τ} / (e^{s_ip/τ} + Σ_j e^{s_ij/τ} + Σ_k e^{s_ik/τ}) )

where s is the cosine, j runs over the positives of all *other* queries of the whole job, and what
is probably another right answer is left out of the sums (`Rules`). Other positives of the same
query are neither negatives nor part of each other's denominator. On a mesh every device works on
its own queries against all documents: documents are gathered, logits are not ([b, B P] a device),
and the gradient through `all_gather` and `psum` is that of the whole batch, with no factor to
correct.

    one query with two positives (P = 2) and two own negatives, in a batch of three queries:

              p00 p01 | p10 p11 | p20 p21 | n0 n1          + numerator   - denominator only
        q0     +   +  |  -   -  |  x   -  |  -  x          x masked: same key or group, or scored
                                                             above the positive

Everything here is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt32

from tte_jax.nn.norms import l2_normalise

BATCH_AXES = ("data", "fsdp")
MASKED = -1e30

Leaf = Any
"""NumPy where a batch is made, traced inside a step."""


@dataclass(frozen=True)
class Rules:
    """What the loss does with the similarities.

    Attributes:
      symmetric: documents choose among queries as well; the two directions count half each.
      share_negatives: a query's mined negatives stand in every query's denominator, not only in its
        own. Costs a gather of K times as many documents.
      dimensions: further lengths at which embeddings are cut, normalised again and trained
        (Matryoshka); the whole length is always one of them, and all count alike.
      margin: an in-batch or mined document with s_ij > s_pos + margin is taken for another right
        answer and left out; None = off. s_pos is the best positive of the query.
      teacher_threshold: a mined negative whose teacher score is at least this share of the
        positive's is left out; None = off.
      soft_weight: share of the loss, for queries with teacher scores, that is the Kullback-Leibler
        divergence from the teacher's distribution over the positive and the mined negatives. These
        take part with their scores, so no mask applies to them there.
      soft_temperature: divides the teacher's logits.
      rows: similarities are computed for so many queries at a time and again in the backward pass,
        which bounds memory; 0 = all at once.
    """

    symmetric: bool = False
    share_negatives: bool = False
    dimensions: tuple[int, ...] = ()
    margin: float | None = None
    teacher_threshold: float | None = None
    soft_weight: float = 0.0
    soft_temperature: float = 1.0
    rows: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of a batch beside its embeddings: B queries, P positives and K negatives each.

    Keys and groups are 64-bit hashes as two uint32: no accident of hashing hides a negative.

    Attributes:
      weight: [B] float32, 0 at rows that only fill up the batch.
      group: [B 2], of the query's positives; (0, 0) = none.
      positive_key: [B P 2]; positive_mask: [B P] bool, the first is always there in a real row.
      negative_key: [B K 2]; negative_mask: [B K] bool.
      positive_score: [B] float32, the teacher's P(yes) of the first positive; NaN = none.
      negative_score: [B K] float32, NaN = none.
    """

    weight: Leaf
    group: Leaf
    positive_key: Leaf
    positive_mask: Leaf
    negative_key: Leaf
    negative_mask: Leaf
    positive_score: Leaf
    negative_score: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Not yet normalised: queries [B D], positives [B P D], negatives [B K D]."""

    queries: Leaf
    positives: Leaf
    negatives: Leaf


def contrastive(
    embeddings: Embeddings,
    labels: Labels,
    scale: Float[Array, ""],
    rules: Rules,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss over real queries, and what is worth watching.

    Args:
      embeddings: split over the mesh's batch axes along B, as `labels` are.
      scale: 1 / τ.
      mesh: of `tte_jax.sharding`; None = one device.

    Returns:
      The loss; metrics, all scalars: "hit" share of queries whose best document of the denominator
      is a positive; "positive" mean cosine of the first positive; "negative" of the hardest
      unmasked negative; "hardness" of the own mined negatives less the positive; "masked" share
      of would-be negatives that were left out.
    """
    if mesh is None:
        return _local(embeddings, labels, scale, rules, None)
    spec = PartitionSpec(BATCH_AXES)
    over = partial(_local, rules=rules, axes=BATCH_AXES)
    return jax.shard_map(
        over, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=PartitionSpec()
    )(embeddings, labels, scale)


@dataclass(frozen=True)
class _Documents:
    """Candidates that many queries look at: vectors [N D], keys [N 2], groups [N 2], query [N]
    (the row of the whole batch that each belongs to), mask [N]."""

    vectors: Array
    key: Array
    group: Array
    owner: Array
    mask: Array


def _local(
    embeddings: Embeddings, labels: Labels, scale: Array, rules: Rules, axes: Any
) -> tuple[Array, dict[str, Array]]:
    """One device's share; sums over `axes` make it the whole."""
    total = _sum(labels.weight.sum(), axes)
    losses, metrics = [], {}
    for size in (embeddings.queries.shape[-1], *rules.dimensions):
        cut = jax.tree.map(lambda x, n=size: l2_normalise(x[..., :n]), embeddings)
        loss, found = _at_one_size(cut, labels, scale, rules, axes)
        losses.append(_sum(loss, axes) / total)
        metrics = metrics or {k: _ratio(_sum(v, axes), total) for k, v in found.items()}
    return sum(losses, jnp.zeros(())) / len(losses), metrics


def _ratio(sums: Array, total: Array) -> Array:
    """A sum with its own count, or a sum over queries."""
    return sums[0] / jnp.maximum(sums[1], 1) if sums.ndim else sums / total


def _at_one_size(
    z: Embeddings, labels: Labels, scale: Array, rules: Rules, axes: Any
) -> tuple[Array, dict[str, Array]]:
    rows, width = z.positives.shape[:2]
    first = _index(axes) * rows
    owner = first + jnp.arange(rows)
    documents = _flat(z.positives, labels.positive_key, labels.positive_mask, labels, owner)
    everyone = jax.tree.map(lambda x: _gather(x, axes), documents)
    if rules.share_negatives:
        mined = _flat(z.negatives, labels.negative_key, labels.negative_mask, labels, owner)
        mined = replace(mined, group=jnp.zeros_like(mined.group))  # a group is of positives
        mined = jax.tree.map(lambda x: _gather(x, axes), mined)
        everyone = jax.tree.map(lambda *x: jnp.concatenate(x), everyone, mined)
    forward = _in_blocks(
        partial(_queries_choose, everyone=everyone, scale=scale, rules=rules),
        (z, labels, owner),
        rules.rows,
    )
    loss, metrics = forward
    if rules.symmetric:
        queries = _gather(z.queries, axes), _gather(labels.weight, axes)
        known = _gather(labels.positive_key, axes), _gather(labels.positive_mask, axes)
        best = _gather(_best_positive(z, labels), axes)
        backward, _ = _in_blocks(
            partial(
                _documents_choose,
                everyone=(*queries, *known, _gather(labels.group, axes), best),
                scale=scale,
                rules=rules,
            ),
            (z, labels, owner),
            rules.rows,
        )
        loss = 0.5 * (loss + backward)
    return loss, metrics


def _flat(x: Array, key: Array, mask: Array, labels: Labels, owner: Array) -> _Documents:
    rows, each = mask.shape
    repeat = partial(jnp.repeat, repeats=each, axis=0)
    mask = mask & (labels.weight > 0)[:, None]
    return _Documents(
        x.reshape(rows * each, -1),
        key.reshape(-1, 2),
        repeat(labels.group),
        repeat(owner),
        mask.reshape(-1),
    )


jax.tree_util.register_dataclass(
    _Documents, data_fields=["vectors", "key", "group", "owner", "mask"], meta_fields=[]
)


def _queries_choose(
    block: tuple[Embeddings, Labels, Array], everyone: _Documents, scale: Array, rules: Rules
) -> tuple[Array, dict[str, Array]]:
    """Summed loss of some queries against all documents."""
    z, labels, owner = block
    s = _dot("bd,nd->bn", z.queries, everyone.vectors)
    own = owner[:, None] == everyone.owner[None, :]
    wrong = _false_negative(labels, everyone.key, everyone.group)
    best = _best_positive(z, labels)
    if rules.margin is not None:
        wrong |= jax.lax.stop_gradient(s) > best[:, None] + rules.margin
    candidate = everyone.mask[None, :] & ~own
    in_batch = candidate & ~wrong
    # Own mined negatives; where they are shared, they still are the query's own, and stand here.
    mine = _dot("bd,bkd->bk", z.queries, z.negatives)
    spared = _own_false_negative(labels, mine, best, rules)
    kept = labels.negative_mask & ~spared
    positive = _dot("bd,bpd->bp", z.queries, z.positives)
    others = jnp.concatenate(
        [jnp.where(in_batch, scale * s, MASKED), jnp.where(kept, scale * mine, MASKED)], axis=1
    )
    denominator = jax.nn.logsumexp(others, axis=1, keepdims=True)
    nll = jnp.logaddexp(scale * positive, denominator) - scale * positive
    loss = _mean_over_positives(nll, labels)
    if rules.soft_weight:
        soft, has = _distil(positive[:, 0], mine, labels, scale, rules)
        share = rules.soft_weight * has
        loss = (1 - share) * loss + share * soft
    weight = labels.weight
    hardest = others.max(1) / scale
    negatives = (candidate.sum(1) + labels.negative_mask.sum(1)).astype(jnp.float32)
    left_out = ((candidate & wrong).sum(1) + (labels.negative_mask & spared).sum(1)) * 1.0
    hard = jnp.where(labels.negative_mask, mine - positive[:, :1], 0).sum(1)
    metrics = {
        "hit": jnp.sum(weight * (best > hardest)),
        "positive": jnp.sum(weight * positive[:, 0]),
        # Where every negative is masked there is no hardest one.
        "negative": _pair(weight * (hardest > -2), jnp.maximum(hardest, -2)),
        "hardness": jnp.stack(
            [jnp.sum(weight * hard), jnp.sum(weight * labels.negative_mask.sum(1))]
        ),
        "masked": jnp.stack([jnp.sum(weight * left_out), jnp.sum(weight * negatives)]),
    }
    return jnp.sum(weight * loss), jax.lax.stop_gradient(metrics)


def _documents_choose(
    block: tuple[Embeddings, Labels, Array],
    everyone: tuple[Array, ...],
    scale: Array,
    rules: Rules,
) -> tuple[Array, dict[str, Array]]:
    """Summed loss of the positives of some queries, each choosing among all queries."""
    z, labels, owner = block
    queries, weight, keys, masks, groups, best = everyone
    s = _dot("bpd,nd->bpn", z.positives, queries)
    own = owner[:, None] == jnp.arange(len(queries))[None, :]
    # Query n has a positive with the key of document (b, p), or one of its group.
    same = jnp.zeros(s.shape, bool)
    for p in range(keys.shape[1]):
        equal = _equal(labels.positive_key[:, :, None], keys[None, None, :, p])
        same |= equal & masks[None, None, :, p]
    grouped = _equal(labels.group[:, None], groups[None]) & groups.any(-1)[None]
    same |= grouped[:, None, :]
    if rules.margin is not None:
        same |= jax.lax.stop_gradient(s) > best[None, None, :] + rules.margin
    right = _dot("bpd,bd->bp", z.positives, z.queries)
    out = same | own[:, None, :] | (weight == 0)[None, None, :]
    denominator = jax.nn.logsumexp(jnp.where(out, MASKED, scale * s), axis=2)
    nll = jnp.logaddexp(scale * right, denominator) - scale * right
    return jnp.sum(labels.weight * _mean_over_positives(nll, labels)), {}


def _mean_over_positives(nll: Array, labels: Labels) -> Array:
    there = labels.positive_mask
    return jnp.where(there, nll, 0).sum(1) / jnp.maximum(there.sum(1), 1)


def _best_positive(z: Embeddings, labels: Labels) -> Array:
    """[B] cosine of each query's best positive; a constant to the gradient."""
    s = _dot("bd,bpd->bp", z.queries, z.positives)
    return jax.lax.stop_gradient(jnp.where(labels.positive_mask, s, -2).max(1))


def _false_negative(labels: Labels, key: Array, group: Array) -> Bool[Array, "B N"]:
    """Documents that are one of the query's own positives again, or of its group."""
    same = jnp.zeros((len(labels.weight), len(key)), bool)
    for p in range(labels.positive_key.shape[1]):
        equal = _equal(labels.positive_key[:, p, None], key[None])
        same |= equal & labels.positive_mask[:, p, None]
    return same | (_equal(labels.group[:, None], group[None]) & group.any(-1)[None])


def _own_false_negative(
    labels: Labels, mine: Array, best: Array, rules: Rules
) -> Bool[Array, "B K"]:
    spared = jnp.zeros(mine.shape, bool)
    for p in range(labels.positive_key.shape[1]):
        equal = _equal(labels.positive_key[:, p, None], labels.negative_key)
        spared |= equal & labels.positive_mask[:, p, None]
    if rules.margin is not None:
        spared |= jax.lax.stop_gradient(mine) > best[:, None] + rules.margin
    if rules.teacher_threshold is not None:  # a comparison with NaN, no score, is False
        spared |= labels.negative_score >= rules.teacher_threshold * labels.positive_score[:, None]
    return spared


def _distil(
    positive: Array, mine: Array, labels: Labels, scale: Array, rules: Rules
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """KL(teacher ‖ student) over the first positive and the scored negatives; 1.0 where there are
    any."""
    scored = labels.negative_mask & ~jnp.isnan(labels.negative_score)
    has = ~jnp.isnan(labels.positive_score) & scored.any(1)
    scores = jnp.concatenate([labels.positive_score[:, None], labels.negative_score], axis=1)
    there = jnp.concatenate([has[:, None], scored & has[:, None]], axis=1)
    chance = jnp.clip(jnp.where(there, scores, 0.5), 1e-6, 1 - 1e-6)
    logits = (jnp.log(chance) - jnp.log1p(-chance)) / rules.soft_temperature
    teacher = jax.nn.log_softmax(jnp.where(there, logits, MASKED), axis=1)
    student = scale * jnp.concatenate([positive[:, None], mine], axis=1)
    student = jax.nn.log_softmax(jnp.where(there, student, MASKED), axis=1)
    terms = jnp.where(there, jnp.exp(teacher) * (teacher - student), 0)
    return jnp.where(has, terms.sum(1), 0), has.astype(jnp.float32)


def _pair(weight: Array, value: Array) -> Array:
    return jnp.stack([jnp.sum(weight * value), jnp.sum(weight)])


def _dot(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _equal(a: UInt32[Array, "*n 2"], b: UInt32[Array, "*n 2"]) -> Array:
    return (a == b).all(-1)


def _in_blocks(
    function: Callable[[Any], tuple[Array, dict[str, Array]]], rows: Any, size: int
) -> tuple[Array, dict[str, Array]]:
    """`function` over blocks of the leading dimension, recomputed in the backward pass, summed."""
    count = len(jax.tree.leaves(rows)[0])
    if not size or size >= count or count % size:
        return function(rows)
    blocks = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), rows)
    parts = jax.lax.map(jax.checkpoint(function), blocks)
    return jax.tree.map(lambda x: x.sum(0), parts)


def _gather(x: Array, axes: Any) -> Array:
    return x if axes is None else jax.lax.all_gather(x, axes, tiled=True)


def _sum(x: Array, axes: Any) -> Array:
    return x if axes is None else jax.lax.psum(x, axes)


def _index(axes: Any) -> Any:
    return 0 if axes is None else jax.lax.axis_index(axes)
