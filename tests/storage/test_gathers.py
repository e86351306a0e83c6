"""Rows of many parts are taken as one tensor would give them, wherever in memory the parts lie."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.storage import gathers
from palcache.storage.gathers import MappedRows

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64]


def random_parts(counts: list[int], shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-100, 100, (n, *shape), generator=g).to(dtype) for n in counts]


def bases_of(parts: list[torch.Tensor]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.cumsum([0, *(len(part) for part in parts)])


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    shape=st.sampled_from([(), (1,), (3,), (8,), (2, 5)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_rows_equal_those_of_one_tensor(
    counts: list[int], shape: tuple[int, ...], dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    parts = random_parts(counts, shape, dtype, seed)
    whole, rows = torch.cat(parts), MappedRows(parts, bases_of(parts))
    numbers = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=20))
    at = torch.tensor(numbers, dtype=torch.int64)
    before = at.clone()
    assert torch.equal(rows.take(at), whole[at])
    assert torch.equal(at, before)
    if (found := rows.neighbours(at)) is not None:
        assert torch.equal(found, whole[at])


def test_neighbours_of_one_part_are_not_copied() -> None:
    parts = random_parts([4, 5], (3,), torch.float32, 0)
    rows = MappedRows(parts, bases_of(parts))
    found = rows.neighbours(torch.tensor([5, 6, 7]))
    assert found is not None
    assert found.data_ptr() == parts[1][1:].data_ptr()
    for numbers in ([3, 4], [6, 5], [5, 7], [5], [5, 5]):
        assert rows.neighbours(torch.tensor(numbers)) is None


@pytest.mark.parametrize("width", [1, 7, 384])
def test_maps_of_files_far_apart(tmp_path: Path, width: int) -> None:
    """Files of many pages, and memory of other kinds between them."""
    parts, kept = [], []
    for number in range(5):
        values = np.random.default_rng(number).integers(-99, 99, (50 + number, width)).astype(np.float16)
        (tmp_path / str(number)).write_bytes(bytes(4_096) + values.tobytes())
        with (tmp_path / str(number)).open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        kept.append(np.empty(3 << 20))
        array = np.frombuffer(buffer, np.float16, values.size, 4_096).reshape(values.shape)
        parts.append(torch.from_numpy(array))
    whole, rows = torch.cat(parts), MappedRows(parts, bases_of(parts))
    at = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows.take(at), whole[at])


def test_a_part_between_whole_values_is_read_right() -> None:
    """Other programs may write a file whose datasets begin anywhere."""
    memory = np.zeros(4 * 30 + 2, np.uint8)
    odd = np.frombuffer(memory.data, np.float32, 30, offset=2).reshape(10, 3)
    odd[:] = np.arange(30).reshape(10, 3)
    parts = [torch.ones(4, 3), torch.from_numpy(odd)]
    rows = MappedRows(parts, bases_of(parts))
    assert torch.equal(rows.take(torch.tensor([13, 0, 4])), torch.cat(parts)[[13, 0, 4]])


def test_what_is_read_ahead_are_the_pages_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring pages are one request, and so are pages with a small gap between them."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(gathers, "_advise", lambda: lambda address, length: asked.append((address, length)))
    monkeypatch.setattr(gathers, "GAP_PAGES", 1)
    parts, page = list[torch.Tensor](), mmap.PAGESIZE
    for number in range(2):
        (tmp_path / str(number)).write_bytes(bytes(20 * page))
        with (tmp_path / str(number)).open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        parts.append(torch.from_numpy(np.frombuffer(buffer, np.uint8).reshape(40, page // 2)))
    rows = MappedRows(parts, bases_of(parts))
    for numbers, expected in (
        ([0], [(0, 0, 1)]),
        ([5, 0, 1], [(0, 0, 3)]),
        ([0, 8, 9], [(0, 0, 1), (0, 4, 1)]),
        ([39, 41, 40], [(0, 19, 1), (1, 0, 1)]),
        ([], []),
    ):
        asked.clear()
        rows.read_ahead(torch.tensor(numbers, dtype=torch.int64))
        pages = [(parts[part].data_ptr() + first * page, count * page) for part, first, count in expected]
        assert sorted(asked) == sorted(pages)


def test_a_system_without_advice_reads_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_WILLNEED", raising=False)
    gathers._advise.cache_clear()
    parts = random_parts([4, 5], (3,), torch.float32, 0)
    rows = MappedRows(parts, bases_of(parts))
    rows.read_ahead(torch.tensor([8, 1]))
    assert torch.equal(rows.take(torch.tensor([8, 1])), torch.cat(parts)[[8, 1]])
    gathers._advise.cache_clear()
