"""Rows that stand in many memory maps, taken by number in one operation."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch

GAP_PAGES: Final = 16
"""Pages between two runs of pages that are read ahead as one run."""


@final
class MappedRows:
    """One dataset of every shard, its entries counted through the shards.

    All maps lie in one address space, so one strided view from the lowest to the highest holds every row, and a gather is
    one operation however many shards there are. The view spans memory that is not the maps'; only rows are ever read.

    Args:
        parts: the dataset of each shard, (n_i, ...) each, contiguous, of one type and one shape but for n_i; at least one.
        bases: the number of each shard's first entry, and of all entries, (s + 1,).
    """

    def __init__(self, parts: Sequence[torch.Tensor], bases: npt.NDArray[np.int64]) -> None:
        size = parts[0].element_size()
        self._parts = [part if part.data_ptr() % size == 0 else part.clone() for part in parts]
        self._bases = bases
        self._cuts = torch.from_numpy(bases[1:-1].astype(np.int64))
        self._shape = tuple(parts[0].shape[1:])
        self._view, starts, self._units = _span(self._parts)
        self._shifts = starts - torch.from_numpy(bases[:-1].astype(np.int64)) * self._units

    def take(self, at: torch.Tensor) -> torch.Tensor:
        """Return entries by their number, (n,) int64 -> (n, ...); numbers must be in range."""
        if len(self._parts) == 1:
            return torch.index_select(self._parts[0], 0, at)
        return self.at_places(self.places(at))

    def places(self, at: torch.Tensor) -> torch.Tensor:
        """Return where entries are in the strided view, (n,) int64."""
        first = torch.index_select(self._shifts, 0, torch.bucketize(at, self._cuts, right=True))
        return first.add_(at, alpha=self._units)

    def at_places(self, places: torch.Tensor) -> torch.Tensor:
        """Return the entries at some places of the strided view, (n,) -> (n, ...)."""
        return torch.index_select(self._view, 0, places).reshape(len(places), *self._shape)

    def read_ahead(self, at: torch.Tensor) -> None:
        """Let the system read the pages of some entries, (n,), now and in long runs; without `madvise` nothing happens.

        Left to itself, a map is read where it is touched, and many systems then read megabytes around each place.
        """
        advise = _advise()
        if advise is None or not at.numel():
            return
        size = self._view.element_size()
        starts = self._view.data_ptr() + np.sort(self.places(at).numpy()) * (self._view.stride(0) * size)
        first = starts // mmap.PAGESIZE
        last = (starts + self._view.shape[1] * size - 1) // mmap.PAGESIZE
        cuts = np.flatnonzero(first[1:] - last[:-1] - 1 > GAP_PAGES) + 1
        for begin, end in zip(first[np.r_[0, cuts]].tolist(), last[np.r_[cuts - 1, -1]].tolist(), strict=True):
            advise(begin * mmap.PAGESIZE, (end + 1 - begin) * mmap.PAGESIZE)

    def neighbours(self, at: torch.Tensor) -> torch.Tensor | None:
        """Return entries without a copy where they are neighbours of one shard in ascending order, else None."""
        if at.numel() < 2 or int(at[-1]) - int(at[0]) != at.numel() - 1 or not bool((at[1:] > at[:-1]).all()):
            return None
        part = int(np.searchsorted(self._bases, int(at[0]), side="right")) - 1
        if int(at[-1]) >= int(self._bases[part + 1]):
            return None
        return self._parts[part][int(at[0]) - int(self._bases[part]) : int(at[-1]) + 1 - int(self._bases[part])]


def _span(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return a view of overlapping rows that spans all parts, the row at which each begins, (s,), and rows per entry."""
    filled = [part for part in parts if part.numel()] or list(parts)
    size, width = parts[0].element_size(), math.prod(parts[0].shape[1:])
    lowest = min(part.data_ptr() for part in filled)
    starts = [(part.data_ptr() - lowest) // size if part.numel() else 0 for part in parts]
    step = math.gcd(width, *starts)
    count = max(start + part.numel() for start, part in zip(starts, parts, strict=True))
    if not count:
        return parts[0].reshape(0, width), torch.zeros(len(parts), dtype=torch.int64), 1
    memory = (ctypes.c_byte * (count * size)).from_address(lowest)
    flat = torch.frombuffer(memory, dtype=parts[0].dtype)
    view = torch.as_strided(flat, ((count - width) // step + 1, width), (step, 1))
    return view, torch.tensor(starts) // step, width // step


@functools.cache
def _advise() -> Callable[[int, int], object] | None:
    """Return what tells the system that it should read the pages at an address, for so many bytes."""
    wanted = getattr(mmap, "MADV_WILLNEED", None)
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    if wanted is None:
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda address, length: madvise(address, length, wanted)
