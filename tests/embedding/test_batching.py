"""Batches hold every row once, stay within the budget, and depend on the token counts alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.embedding.batching import MAX_ROWS, padded_tokens, plan_batches

COUNTS = st.lists(st.integers(0, 40), max_size=60)


@settings(deadline=None, max_examples=150)
@given(COUNTS, st.integers(1, 200), st.booleans())
def test_every_row_once_within_the_budget_longest_first(counts: list[int], budget: int, equal: bool) -> None:
    n_tokens = np.array(counts, np.uint32)
    batches = plan_batches(n_tokens, budget, equal_lengths=equal)
    assert sorted(row for rows in batches for row in rows.tolist()) == list(range(len(counts)))
    lengths = [n_tokens[row] for rows in batches for row in rows.tolist()]
    assert lengths == sorted(counts, reverse=True)
    for rows in batches:
        padded = len(rows) * max(1, int(n_tokens[rows].max()))
        assert padded <= budget or len(rows) == 1
        assert not equal or len({max(1, int(count)) for count in n_tokens[rows]}) == 1


@settings(deadline=None, max_examples=100)
@given(COUNTS, st.integers(1, 200), st.booleans())
def test_no_batch_could_take_the_next_row(counts: list[int], budget: int, equal: bool) -> None:
    n_tokens = np.array(counts, np.uint32)
    batches = plan_batches(n_tokens, budget, equal_lengths=equal)
    for rows, following in zip(batches, batches[1:], strict=False):
        longest, other = (max(1, int(n_tokens[part[0]])) for part in (rows, following))
        assert (len(rows) + 1) * longest > budget or (equal and longest != other)


def test_a_plan_by_hand() -> None:
    batches = plan_batches(np.array([3, 9, 2, 5, 2, 20], np.uint32), 10)
    assert [rows.tolist() for rows in batches] == [[5], [1], [3, 0], [2, 4]]
    assert padded_tokens(np.array([3, 9, 2, 5, 2, 20], np.uint32), batches) == 20 + 9 + 10 + 4
    batches = plan_batches(np.array([3, 9, 2, 5, 2, 20], np.uint32), 10, equal_lengths=True)
    assert [rows.tolist() for rows in batches] == [[5], [1], [3], [0], [2, 4]]


def test_rows_of_one_length_stay_in_order() -> None:
    batches = plan_batches(np.full(7, 3, np.uint32), 9)
    assert [rows.tolist() for rows in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    n_tokens = np.random.default_rng(0).integers(1, 4, 2_003).astype(np.uint32)
    for rows in plan_batches(n_tokens, 300):
        for length in (1, 2, 3):
            assert np.all(np.diff(rows[n_tokens[rows] == length]) > 0)


@pytest.mark.parametrize("count", [0, 1])
def test_batches_have_at_most_max_rows(count: int) -> None:
    batches = plan_batches(np.full(2 * MAX_ROWS + 5, count, np.uint32), 10**9)
    assert [len(rows) for rows in batches] == [MAX_ROWS, MAX_ROWS, 5]


def test_the_largest_counts_do_not_overflow() -> None:
    batches = plan_batches(np.array([2**32 - 1, 1, 2**31], np.uint32), 100)
    assert [rows.tolist() for rows in batches] == [[0], [2], [1]]


def test_no_rows_make_no_batches() -> None:
    assert plan_batches(np.empty(0, np.uint32), 10) == []
    assert padded_tokens(np.empty(0, np.uint32), []) == 0
