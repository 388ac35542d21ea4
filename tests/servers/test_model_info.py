"""What `Info` says of a role that callers cannot find out by trying."""

from __future__ import annotations

from servers.model_service import model_info
from tests import tiny_models


def test_only_a_reasoner_has_a_largest_budget():
    reasoner = tiny_models.reasoner()
    assert model_info(reasoner).max_new_tokens == reasoner.served.buckets.new_tokens > 0
    assert model_info(tiny_models.embedder()).max_new_tokens == 0
    assert model_info(tiny_models.reranker()).max_new_tokens == 0
