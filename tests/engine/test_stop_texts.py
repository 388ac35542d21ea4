from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tte_jax.engine.stop_texts import StopTexts

few_letters = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(st.lists(few_letters, max_size=8), stops)
def test_pieces_join_to_the_text_before_the_first_stop(pieces: list[str], texts: list[str]) -> None:
    rules = StopTexts(texts, decode=lambda ids: "")
    stream = rules.stream()
    shown = [stream.push(p, last=i == len(pieces) - 1) for i, p in enumerate(pieces)]
    whole = "".join(pieces)
    assert "".join(shown) == rules.cut(whole)
    assert not any(stop in rules.cut(whole) for stop in texts)
    # Nothing is held back for longer than it may be the beginning of a stop.
    for i in range(len(pieces)):
        before, sent = "".join(pieces[: i + 1]), "".join(shown[: i + 1])
        assert len(rules.cut(before)) - len(sent) <= max(map(len, texts), default=1) - 1


def test_the_first_of_several_stops_ends_the_text() -> None:
    rules = StopTexts(("\n", "Answer"), decode=lambda ids: "".join(map(chr, ids)))
    assert rules.cut("a cat\nAnswer") == "a cat"
    assert rules.cut("Answer: cat\n") == ""
    assert rules.reached([ord(c) for c in "cat\n"]) and not rules.reached([ord("c")])
