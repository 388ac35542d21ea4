from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tte_jax.filters import AllOf, AnyOf, Equals, Not, OneOf, Prefix, Range
from tte_jax.index.columns import Columns

fields = st.sampled_from(["a", "b", "never"])
values = st.one_of(
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([0.0, 1.0, 1.5, -2.0]),
    st.sampled_from(["", "x", "xy", "1"]),
)
ends = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 1.0, 1.5]))
leaves = st.one_of(
    st.builds(Equals, fields, values),
    st.builds(OneOf, fields, st.lists(values, max_size=3).map(tuple)),
    st.builds(Range, fields, ends, ends),
    st.builds(Prefix, fields, st.sampled_from(["", "x", "xy"])),
)
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(AllOf, st.lists(inner, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Not, inner),
    ),
    max_leaves=6,
)
rows = st.lists(st.dictionaries(st.sampled_from(["a", "b"]), values), max_size=12)


@settings(max_examples=300, deadline=None)
@given(rows=rows, first=conditions, second=conditions)
def test_a_mask_says_what_the_filter_says(rows, first, second):
    columns = Columns(rows)
    for condition in (first, second, first):
        assert columns.mask(condition).tolist() == [condition.matches(row) for row in rows]


def test_flags_and_numbers_are_told_apart():
    columns = Columns([{"n": True}, {"n": 1}, {"n": 1.0}, {"n": "1"}, {}])
    assert columns.mask(Equals("n", 1)).tolist() == [False, True, True, False, False]
    assert columns.mask(Equals("n", True)).tolist() == [True, False, False, False, False]
