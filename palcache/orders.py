"""In which order comparisons are trained on, and which vectors are read ahead where they do not all fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import torch

from palcache.devices import free_memory
from palcache.tensors import MEMORY_SHARE, ComparisonData

BLOCKS: Final = 64
"""Streamed comparisons are mixed so many blocks of neighbours at a time: a window."""
Data = TypeVar("Data", bound=ComparisonData[Any])


def order_seed(seed: int, epoch: int) -> int:
    """Return the seed of the order of an epoch: seeds and epochs never share one."""
    return (seed << 25) + epoch


def epoch_order(n: int, seed: int, *, window: int | None = None) -> torch.Tensor:
    """Return a permutation of n comparisons, (n,) int64.

    Without a window they are permuted freely. With one, blocks of neighbours are permuted, `BLOCKS` to a window, and the
    comparisons within each window: whoever reads a window at a time reads runs of neighbours, each once an epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    if window is None:
        return torch.randperm(n, generator=generator)
    blocks = torch.split(torch.arange(n), max(1, window // BLOCKS))
    shuffled = [blocks[i] for i in torch.randperm(len(blocks), generator=generator).tolist()]
    parts = [torch.cat(shuffled[at : at + BLOCKS]) for at in range(0, len(shuffled), BLOCKS)]
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])


def in_windows(data: Data, batches: Sequence[torch.Tensor], *, before: int = 0) -> Iterator[tuple[Data, torch.Tensor]]:
    """Yield batches of comparisons, each with the data to take it from: streamed vectors are read a window at a time.

    Args:
        data: all comparisons.
        batches: their rows, in the order of an epoch.
        before: comparisons of the epoch before the first batch.
    """
    window = data.window if data.streamed else None
    if window is None:
        yield from ((data, rows) for rows in batches)
        return
    groups: dict[int, list[torch.Tensor]] = {}
    for rows in batches:
        groups.setdefault(before // window, []).append(rows)
        before += len(rows)
    for group in groups.values():
        at_hand = data.gathered(torch.cat(group))
        yield from ((at_hand, rows) for rows in group)


def kept_at_hand(data: Data) -> Data:
    """Return streamed comparisons with their vectors in memory where that has room, for what is read again and again."""
    if not data.streamed or data.vector_bytes(len(data)) > MEMORY_SHARE * free_memory(data.device):
        return data
    return data.gathered(torch.arange(len(data), device=data.device))
