"""Random histories against a dictionary."""

from __future__ import annotations

import shutil
import tempfile

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.index.documents import make_entry, random_units
from tte_jax.filters import Equals, Not, OneOf
from tte_jax.index import CorpusIndex, IndexConfig

IDS = [f"d{i}" for i in range(12)]
# Few distinct vectors, so that ties are common.
VECTORS = random_units(np.random.default_rng(0), 8, 5)
CONFIG = IndexConfig(delta_rows=6, delta_share=0.5)

vectors = st.integers(0, len(VECTORS) - 1)
documents = st.tuples(st.sampled_from(IDS), vectors, st.integers(0, 3))
conditions = st.one_of(
    st.none(),
    st.builds(Equals, st.just("n"), st.integers(0, 3)),
    st.builds(lambda v: Not(OneOf("n", tuple(v))), st.lists(st.integers(0, 3), max_size=3)),
)


class CorpusModel(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.path = tempfile.mkdtemp()
        self.index = CorpusIndex.open(self.path, config=CONFIG, snapshot_every=9)
        self.model: dict[str, tuple[int, int]] = {}
        self.sequence = 0

    def teardown(self):
        if hasattr(self, "index"):
            assert self.index.verify() == []
            self.index.close()
            shutil.rmtree(self.path)

    @rule(batch=st.lists(documents, min_size=1, max_size=5))
    def upsert(self, batch):
        entries = [
            make_entry(id, VECTORS[v], metadata={"n": n}, image=f"image {v}".encode())
            for id, v, n in batch
        ]
        self.sequence += len(batch)
        assert self.index.upsert(entries) == self.sequence
        self.model.update({id: (v, n) for id, v, n in batch})

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=5))
    def delete(self, ids):
        distinct = list(dict.fromkeys(ids))
        deleted, unknown = self.index.delete(ids)
        assert deleted == [id for id in distinct if id in self.model]
        assert unknown == [id for id in distinct if id not in self.model]
        for id in deleted:
            del self.model[id]
        self.sequence += len(deleted)

    @rule(query=vectors, k=st.integers(1, 15), condition=conditions)
    def search(self, query, k, condition):
        wide = VECTORS[query].astype(np.float64)
        scored = sorted(
            (-float(np.float32((VECTORS[v] * wide).sum())), id)
            for id, (v, n) in self.model.items()
            if condition is None or condition.matches({"n": n})
        )
        # Normalising the query again may move it by one unit in the last place.
        hits = self.index.search(VECTORS[query], k, condition)
        assert [hit.id for hit in hits] == [id for _, id in scored[:k]]
        np.testing.assert_allclose(
            [hit.cosine for hit in hits], [-score for score, _ in scored[:k]], atol=1e-6
        )
        assert all(hit.metadata == {"n": self.model[hit.id][1]} for hit in hits)
        assert all(hit.reasoning.answer == hit.id for hit in hits)

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=5))
    def get(self, ids):
        found = self.index.get(ids)
        assert [d and d.id for d in found] == [id if id in self.model else None for id in ids]
        for document in filter(None, found):
            expected = f"image {self.model[document.id][0]}".encode()
            assert document.content.media[0].data == expected

    @rule()
    def rebuild(self):
        self.index.maintenance.join(30)
        assert self.index.rebuild().rows == len(self.model)

    @rule()
    def snapshot(self):
        assert self.index.snapshot().sequence == self.sequence

    @rule()
    def reopen(self):
        self.index.close()
        self.index = CorpusIndex.open(self.path, config=CONFIG, snapshot_every=9)

    @invariant()
    def counts(self):
        if hasattr(self, "index"):
            stats = self.index.stats()
            assert (stats.documents, stats.sequence) == (len(self.model), self.sequence)
            assert stats.last_error == ""


TestCorpusModel = CorpusModel.TestCase
TestCorpusModel.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
