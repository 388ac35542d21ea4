"""Rows of texts alone: the right candidate says what is asked for, and no other does."""

from __future__ import annotations

import numpy as np

from tests.training.drawings import emoji_data
from training.builtin import texts
from training.builtin.said_rows import SaidRows


def test_one_candidate_says_what_is_asked_for() -> None:
    concepts = emoji_data().concepts
    source = SaidRows(concepts, candidates=5, strangers=3)
    rows = list(source.draw(200, np.random.default_rng(0)))
    assert rows == list(source.draw(200, np.random.default_rng(0)))
    names = {texts.label(c) for c in concepts}
    coined = known = raw = 0
    for row in rows:
        assert row["labels"] == [1] + [0] * (len(row["candidates"]) - 1)
        right, *wrong = row["candidates"]
        assert len(wrong) <= 7 and right not in wrong
        said = right.rsplit("Answer: ", 1)[-1]
        raw += "Answer: " not in right
        if said.replace(": ", ", ") in names:
            known += 1
            # What is typed is a label or words of it and its tags; a reasoning ends in the label.
            if "Answer: " in row["query"]:
                assert row["query"].endswith(f"Answer: {said.replace(': ', ', ')}")
        else:
            coined += 1
            assert row["query"].rsplit("Answer: ", 1)[-1] == said
    assert min(coined, known, raw) > 20


def test_near_misses_of_a_coined_name_share_words_with_it() -> None:
    source = SaidRows(emoji_data().concepts, candidates=5, strangers=0)
    rows = [
        row
        for row in source.draw(100, np.random.default_rng(1))
        if row["query"].rsplit("Answer: ", 1)[-1].count(" ") == 3
    ]
    shares = [
        bool(set(row["candidates"][0].split()) & set(one.split()))
        for row in rows
        for one in row["candidates"][1:]
    ]
    assert len(shares) > 10 and np.mean(shares) > 0.9
