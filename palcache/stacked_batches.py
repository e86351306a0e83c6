"""Batches of a stack of heads: each head's own comparisons, on vectors that all share or that each has gathered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from palcache.fits import Course
from palcache.orders import epoch_order, order_seed
from palcache.tensors import PairBatch, PreferenceData, Table
from palcache.vector_tables import RowPlan, pad_positions, padded_distinct

Dims = tuple[int | None, ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class StackedBatch:
    """The fields of `PairBatch` for h heads at once.

    Attributes:
        values: in the order of the fields; those of heads of their own have a leading axis h.
        dims: for each 0, or None where all heads share it, as `torch.func.vmap` takes it.
    """

    values: tuple[torch.Tensor, ...]
    dims: Dims

    @classmethod
    def shared(cls, batch: PairBatch) -> StackedBatch:
        """Return one batch for all heads."""
        values = (batch.prompts, batch.prompt, batch.responses, batch.response_1, batch.response_2, batch.user, batch.y)
        return cls(values, (None,) * len(values))


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Vectors:
    """Vectors of a batch, (m, d) or (h, m, d), where each reference stands, and the names of the rows."""

    rows: torch.Tensor
    index: torch.Tensor
    names: torch.Tensor
    dims: Dims


@final
class StackedOrder:
    """The comparisons of each step for each head; the order depends on the head's seed and the epoch alone.

    Streamed vectors are read a window at a time where all heads have one seed, and so one order; else step by step.

    Args:
        train: the comparisons.
        seeds: of the heads.
        course: of the training.
    """

    def __init__(self, train: PreferenceData, seeds: Sequence[int], course: Course) -> None:
        self._train, self._seeds, self._course = train, list(seeds), course
        self._epoch, self._window = -1, (-1, -1)
        self._batches: tuple[torch.Tensor, ...] = ()
        self._starts: list[int] = []
        self._at_hand = train

    def take(self, heads: Sequence[int]) -> None:
        """Go on with some of the heads."""
        self._seeds, self._epoch = [self._seeds[i] for i in heads], -1

    def batch(self, step: int) -> StackedBatch:
        """Return the batch of a step (from 0) for every head."""
        epoch, number = divmod(step, self._course.steps_per_epoch)
        if epoch != self._epoch:
            n, window = len(self._train), self._train.window
            orders = [epoch_order(n, order_seed(seed, epoch), window=window) for seed in self._seeds]
            stacked = torch.stack(orders).to(self._train.device)
            self._epoch, self._batches = epoch, stacked.tensor_split(self._course.steps_per_epoch, dim=1)
            self._starts = [0, *itertools.accumulate(rows.shape[1] for rows in self._batches)][:-1]
        self._read_ahead(number)
        return self._gather(self._batches[number])

    def _read_ahead(self, number: int) -> None:
        """Have the vectors of the window that a batch of the epoch begins in at hand."""
        length = self._train.window
        if length is None or not self._train.streamed or len(set(self._seeds)) > 1:
            return
        window = self._starts[number] // length
        if self._window != (self._epoch, window):
            ahead = [rows[0] for rows, at in zip(self._batches, self._starts, strict=True) if at // length == window]
            self._at_hand, self._window = self._train.gathered(torch.cat(ahead)), (self._epoch, window)

    def _gather(self, at: torch.Tensor) -> StackedBatch:
        """Return the batch of some comparisons, (h, n)."""
        train, n = self._at_hand, at.shape[1]
        prompts = self._unread_prompts(at) if train.joint else self._vectors(train.prompts, train.prompt[at])
        pair = torch.cat([train.response_1[at], train.response_2[at]], dim=1)
        responses = self._vectors(train.responses, pair)
        left, right = responses.index[..., :n], responses.index[..., n:]
        values = (
            prompts.rows, prompts.index, responses.rows, left, right, train.user[at], train.y[at], prompts.names,
            responses.names,
        )  # fmt: skip
        (p_rows, p_index, p_names), (r_rows, r_index, r_names) = prompts.dims, responses.dims
        return StackedBatch(values, (p_rows, p_index, r_rows, r_index, r_index, 0, 0, p_names, r_names))

    def _unread_prompts(self, at: torch.Tensor) -> _Vectors:
        """Return the one row that prompts of joint items stand for."""
        zero = torch.zeros(1, dtype=torch.int64, device=at.device)
        return _Vectors(self._at_hand.prompts.take(zero), torch.zeros_like(at), zero, (None, 0, None))

    def _vectors(self, table: Table, index: torch.Tensor) -> _Vectors:
        """Return the vectors of references to a table, (h, r), by the plan by which a head alone would read them.

        A table that is read whole is shared: its vectors are there once. Distinct rows are sought on a CPU only, where it
        makes no device wait.
        """
        m, r = len(table), index.shape[1]
        plan = RowPlan.of(m, r)
        if plan is RowPlan.WHOLE and table.resident is not None:
            return _Vectors(table.resident, index, torch.arange(m, device=index.device), (None, 0, None))
        if plan is not RowPlan.OWN and index.device.type == "cpu":
            found = [torch.unique(row, return_inverse=True) for row in index]
            longest = max(padded_distinct(m, r), *(len(rows) for rows, _ in found))
            names = torch.stack([pad_positions(rows, longest) for rows, _ in found])
            return _Vectors(_take(table, names), torch.stack([inverse for _, inverse in found]), names, (0, 0, 0))
        return _Vectors(_take(table, index), torch.arange(r, device=index.device), index, (0, None, 0))


def _take(table: Table, index: torch.Tensor) -> torch.Tensor:
    """Return the vectors at (h, r), (h, r, d); of a streamed table each distinct row is read once."""
    if not table.streamed:
        return table.take(index.reshape(-1)).reshape(*index.shape, -1)
    distinct, inverse = torch.unique(index, return_inverse=True)
    return table.take(distinct)[inverse]
