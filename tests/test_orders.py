"""The order of an epoch is a function of seed and data alone, and streamed vectors are read once a window."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache import orders, tensors
from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig
from palcache.heads import PalB
from palcache.orders import epoch_order, order_seed
from palcache.tensors import PairBatch, VectorTable
from palcache.training import FitState, fit
from tests.worlds import make_cache, planted_rows, splits_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a planted world: 7 users, 3 prototypes, width 10, 60 comparisons each."""
    return make_cache(tmp_path_factory.mktemp("orders") / "cache", *planted_rows())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 900), seed=st.integers(0, 2**40), blocks=st.integers(1, 4), rows=st.integers(1, 9))
def test_an_epoch_is_every_comparison_once(n: int, seed: int, blocks: int, rows: int) -> None:
    """Of streamed data, a window holds comparisons of at most as many blocks as are mixed at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "BLOCKS", blocks)
        for window in (None, rows * blocks):
            order = epoch_order(n, seed, window=window)
            assert sorted(order.tolist()) == list(range(n))
            assert torch.equal(order, epoch_order(n, seed, window=window))
        if n % rows == 0:
            for part in torch.split(order, rows * blocks):
                assert len({row // rows for row in part.tolist()}) <= blocks


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 3, 3, 3], [12], [5, 5, 2]])
@pytest.mark.parametrize("skip", [0, 1])
def test_streamed_vectors_are_read_a_window_at_a_time(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, sizes: list[int], skip: int
) -> None:
    """Each batch is what it is without reading ahead, and each vector of a window is read once."""
    monkeypatch.setattr(tensors, "MEMORY_SHARE", 0)
    monkeypatch.setattr(tensors, "LARGE_BYTES", 0)
    monkeypatch.setattr(tensors, "WINDOW", 4)
    train = splits_of(cache)["train"]
    assert train.window == 4
    batches = torch.split(torch.randperm(12, generator=torch.Generator().manual_seed(0)), sizes)
    read: list[int] = []
    original = VectorTable._read

    def watched(table: VectorTable, rows: torch.Tensor) -> torch.Tensor:
        read.append(len(rows))
        assert torch.equal(rows, torch.unique(rows))
        return original(table, rows)

    monkeypatch.setattr(VectorTable, "_read", watched)
    found = list(orders.in_windows(train, batches[skip:], before=sum(sizes[:skip])))
    windows = {start // 4 for start in np.cumsum([0, *sizes])[skip : len(sizes)].tolist()}
    assert len(read) == 2 * len(windows)
    monkeypatch.undo()
    for (data, rows), expected in zip(found, batches[skip:], strict=True):
        assert torch.equal(rows, expected)
        ours, theirs = data.batch(rows), train.batch(rows)
        for field in dataclasses.fields(PairBatch):
            value, other = getattr(ours, field.name), getattr(theirs, field.name)
            assert value is other is None or torch.equal(value, other)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_window_depends_on_the_comparisons_and_not_on_the_memory(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """So a seed gives one order, streamed or not; few vectors have no windows."""
    monkeypatch.setattr(tensors, "MEMORY_SHARE", share)
    train = splits_of(cache)["train"]
    assert train.streamed == (share == 0.0)
    assert train.window is None
    size = train.vector_bytes(len(train))
    monkeypatch.setattr(tensors, "LARGE_BYTES", size)
    assert train.window is None
    monkeypatch.setattr(tensors, "LARGE_BYTES", size - 1)
    for most, expected in ((size // 4, len(train) // 4), (10 * size, min(tensors.WINDOW, 10 * len(train))), (1, 1)):
        monkeypatch.setattr(tensors, "WINDOW_BYTES", most)
        assert abs((train.window or 0) - expected) <= 1


def test_the_same_seed_trains_the_same_head_streamed_or_not(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted on one machine and resumed on another with more memory, too."""
    monkeypatch.setattr(tensors, "LARGE_BYTES", 0)
    monkeypatch.setattr(tensors, "WINDOW", 70)
    found = {}
    for share in (0.0, 0.4):
        monkeypatch.setattr(tensors, "MEMORY_SHARE", share)
        found[share] = splits_of(cache)
    assert found[0.0]["train"].streamed
    assert not found[0.4]["train"].streamed
    shape = PalB.from_config(HeadConfig(k=2, p=4), d=10, users=7)
    config = FitConfig(batch_size=32, epochs=2, evaluations=3, patience=0)
    states: list[FitState] = []
    streamed = fit(shape, found[0.0]["train"], found[0.0]["val"], config, on_state=states.append)
    for state in (None, states[1]):
        resident = fit(shape, found[0.4]["train"], found[0.4]["val"], config, state=state)
        assert resident.history == streamed.history
        assert all(torch.equal(value, streamed.parameters[name]) for name, value in resident.parameters.items())


def test_validation_is_kept_in_memory_where_it_fits(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MEMORY_SHARE", 0)
    val = splits_of(cache)["val"]
    monkeypatch.setattr(orders, "MEMORY_SHARE", 0.5)
    for free, kept in ((2 * val.vector_bytes(len(val)), True), (2 * val.vector_bytes(len(val)) - 2, False)):
        monkeypatch.setattr(orders, "free_memory", lambda _device, free=free: free)
        assert (not orders.kept_at_hand(val).streamed) == kept


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    seeds = [order_seed(seed, epoch) for seed in range(4) for epoch in range(50)]
    assert len(set(seeds)) == 200
    assert epoch_order(50, 1).tolist() != epoch_order(50, 2).tolist() != list(range(50))
