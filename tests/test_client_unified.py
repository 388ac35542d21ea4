"""Embeddings of a unified reasoner over gRPC, and reasoners that have none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cascade.fakes import FakeReasoner, UnifiedReasoner, ecr, letters
from tests.servers.fake_services import Fakes, stages
from tte_jax.client import RemoteReasoner
from tte_jax.content import Content, Side, Usage
from tte_jax.errors import InternalError, UnsupportedError
from tte_jax.stages import EmbeddingReasonerStage, ReasonItem

ITEMS = [ReasonItem(Content.of(text), Side.QUERY) for text in ("ask", "other")]


async def test_vectors_and_what_they_cost_survive_the_wire():
    fake = UnifiedReasoner({"ask": ecr("so", "aab"), "other": ecr("so", "b")})
    fake.unable = {"other"}
    fakes = Fakes(reasoner=fake)
    async with stages(fakes) as address:
        reasoner = RemoteReasoner(address)
        assert isinstance(reasoner, EmbeddingReasonerStage)
        reasonings, (one, none), usage = await reasoner.reason_and_embed(
            ITEMS, max_tokens=9, timeout_s=5
        )
        plain, _ = await reasoner.reason(ITEMS, max_tokens=9, timeout_s=5)
        await reasoner.close()
    assert reasonings == plain == [ecr("so", "aab"), ecr("so", "b")]
    assert none is None and one is not None
    assert one.vector.dtype == np.float32
    np.testing.assert_array_equal(one.vector, letters("aab"))
    assert one.usage == Usage("embed", 6, 0, 5, 0.0, 0.125, "unified-1", within="reason")
    assert (usage.stage, usage.model_version) == ("reason", "unified-1")
    assert fake.asked_to_embed == ["ask", "other"]


async def test_a_refusal_is_remembered_until_another_model_answers():
    fakes = Fakes()
    async with stages(fakes) as address:
        reasoner = RemoteReasoner(address)

        async def embedded() -> list[bool]:
            found = await reasoner.reason_and_embed(ITEMS, max_tokens=9, timeout_s=5)
            return [e is not None for e in found[1]]

        assert await embedded() == [False, False] and fakes.refused == 1
        assert await embedded() == [False, False] and fakes.refused == 1
        assert fakes.reasoner.calls == 2
        fakes.reasoner = UnifiedReasoner()
        assert await embedded() == [False, False]  # says by its version that it is another
        assert await embedded() == [True, True]
        fakes.reasoner = FakeReasoner()
        assert await embedded() == [False, False] and fakes.refused == 2
        await reasoner.close()


async def test_other_things_that_a_model_cannot_do_are_errors():
    fakes = Fakes(reasoner=UnifiedReasoner(broken=UnsupportedError("no", reason="NO_VISION")))
    async with stages(fakes) as address:
        reasoner = RemoteReasoner(address)
        with pytest.raises(UnsupportedError, match="no"):
            await reasoner.reason_and_embed(ITEMS, max_tokens=9, timeout_s=5)
        await reasoner.close()
    assert fakes.reasoner.calls == 1


async def test_a_vector_that_is_no_vector_is_the_peers_defect(monkeypatch):
    fakes = Fakes(reasoner=UnifiedReasoner())
    monkeypatch.setattr("tests.cascade.fakes.letters", lambda text: np.zeros(0, np.float32))
    async with stages(fakes) as address:
        reasoner = RemoteReasoner(address)
        with pytest.raises(InternalError, match="malformed answer"):
            await reasoner.reason_and_embed(ITEMS, max_tokens=9, timeout_s=5)
        await reasoner.close()
