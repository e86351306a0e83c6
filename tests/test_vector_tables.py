"""Tables hand out the vectors of references by one plan, and part of a table in memory is that part and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache import vector_tables
from palcache.cache import Cache
from palcache.tensors import TensorTable, VectorTable
from palcache.vector_tables import GatheredTable, RowPlan
from tests.worlds import make_cache, planted_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a planted world's cache: 31 responses of width 10."""
    return make_cache(tmp_path_factory.mktemp("tables") / "cache", *planted_rows())


@settings(max_examples=200, deadline=None)
@given(m=st.integers(1, 5_000), r=st.integers(1, 2_000), seed=st.integers(0, 5))
def test_distinct_rows_are_padded_to_one_number(m: int, r: int, seed: int) -> None:
    """What sums over rows add up does not depend on the draw, and a batch is hardly longer than it must be."""
    padded = vector_tables.padded_distinct(m, r)
    index = torch.randint(m, (r,), generator=torch.Generator().manual_seed(seed))
    found = index.unique().numel()  # type: ignore[no-untyped-call]
    assert found <= padded <= min(m, r)
    table = TensorTable(torch.arange(float(m))[:, None])
    vectors, place, names = vector_tables.take_rows(table, index)
    assert torch.equal(vectors[place], index[:, None].float())
    assert torch.equal(names[place], index)
    expected = {RowPlan.WHOLE: m, RowPlan.DISTINCT: padded, RowPlan.OWN: r}[RowPlan.of(m, r)]
    assert len(vectors) == len(names) == expected


def test_an_empty_table_has_a_plan() -> None:
    assert RowPlan.of(0, 0) is RowPlan.OWN
    vectors, place, names = vector_tables.take_rows(TensorTable(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.int64))
    assert (vectors.shape, len(place), len(names)) == ((0, 3), 0, 0)


def table_of(cache: Cache, *, resident: bool) -> VectorTable:
    """Return the responses' table, its rows in an order of its own."""
    stored = cache.comparisons()
    space = cache.space(stored.spaces[0][1])
    order = np.random.default_rng(3).permutation(len(space))
    return VectorTable(space, order, torch.device("cpu"), resident=resident)


def test_what_was_gathered_is_the_table_there(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in pieces; positions are the table's own, in any order and repeated."""
    monkeypatch.setattr(vector_tables, "LOAD_ROWS", 3)
    table, whole = table_of(cache, resident=False), table_of(cache, resident=True)
    part = table.gathered(torch.tensor([7, 2, 2, 19, 4, 30]))
    assert isinstance(part, GatheredTable)
    assert (len(part), part.width, part.streamed, len(part.held)) == (len(table), table.width, False, 5)
    index = torch.tensor([30, 2, 7, 7, 4])
    assert torch.equal(part.take(index), whole.take(index))
    assert torch.equal(whole.take(index), table.take(index))
    assert whole.gathered(index) is whole
    assert part.gathered(index) is part


@pytest.mark.parametrize("position", [0, 5, 31 - 1])
def test_what_was_not_gathered_is_no_other_vector(cache: Cache, position: int) -> None:
    table = table_of(cache, resident=False)
    part = table.gathered(torch.tensor([1, 2]))
    with pytest.raises(IndexError, match="a position whose vector was not gathered"):
        part.take(torch.tensor([1, position]))
