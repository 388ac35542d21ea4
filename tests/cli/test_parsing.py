"""Budgets, filters and metadata values as people type them."""

from __future__ import annotations

import pytest

from tte_jax.cli.parsing import parse_budget, parse_filters, parse_pair, parse_value
from tte_jax.content import Budget
from tte_jax.errors import InvalidInputError
from tte_jax.filters import AllOf, Equals, Not


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("32", Budget(reasoning_tokens=32)),
        ("0", Budget(reasoning_tokens=0)),
        ("rerank=20", Budget(rerank_depth=20)),
        (
            "reasoning=16, candidates=100,rewrite=2,rewrite_tokens=8,rerank=0",
            Budget(16, 100, 2, 8, 0),
        ),
        ("rerank_depth=5,reasoning_tokens=7", Budget(reasoning_tokens=7, rerank_depth=5)),
    ],
)
def test_budget(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "key=value"),
        ("many", "whole number"),
        ("-1", "whole number"),
        ("1.5", "whole number"),
        ("rerank=", "whole number"),
        ("rerank=257", "256"),
        ("candidates=0", "from 1"),
        ("speed=3", "speed"),
        ("rerank=1,rerank=2", "twice"),
        ("rerank=1,rerank_depth=2", "twice"),
        ("32,64", "key=value"),
        ("rerank=1,", "key=value"),
    ],
)
def test_bad_budget_names_what_is_wrong(text: str, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named) as caught:
        parse_budget(text)
    assert caught.value.field == "--budget"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("false", False),
        ("7", 7),
        ("-7", -7),
        ("2.5", 2.5),
        ("1e3", 1000.0),
        ('"7"', "7"),
        ("dark", "dark"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_values_have_the_type_they_look_like(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_filters_are_joined_by_and() -> None:
    assert parse_filters([]) is None
    assert parse_filters(["skin=dark"]) == Equals("skin", "dark")
    assert parse_filters(["skin!=dark"]) == Not(Equals("skin", "dark"))
    assert parse_filters(["year=2020", 'year!="2020"']) == AllOf(
        (Equals("year", 2020), Not(Equals("year", "2020")))
    )


def test_a_pair_keeps_what_follows_the_first_equals_sign() -> None:
    assert parse_pair("url=http://a?b=c", flag="--metadata") == ("url", "http://a?b=c")
    for bad in ("skin", "=dark", " =dark"):
        with pytest.raises(InvalidInputError, match="field=value"):
            parse_pair(bad, flag="--filter")
