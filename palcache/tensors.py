"""From a cache to batches on a device: vectors once, comparisons by index."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Self, TypeVar, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.cache import Cache
from palcache.devices import free_memory, resolve_device
from palcache.storage.comparison_files import StoredComparisons
from palcache.table_spaces import find_rows, spaces_of
from palcache.vector_tables import Table, TensorTable, VectorTable, take_rows

__all__ = [
    "MEMORY_SHARE",
    "ComparisonData",
    "PairBatch",
    "PreferenceData",
    "Table",
    "TensorTable",
    "VectorTable",
    "load_preferences",
    "on_device",
]

MEMORY_SHARE: Final = 0.4
"""Vectors go to the device at once if they fill at most this share of its free memory; else they are streamed."""

WINDOW: Final = 16_384
WINDOW_BYTES: Final = 64 << 20
"""Comparisons of a window, and bytes of its vectors, at most."""
LARGE_BYTES: Final = 1 << 30
"""With more bytes of vectors than this, comparisons are mixed window by window."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class PairBatch:
    """n comparisons over the distinct vectors that they use; each is one pair of rows, or several (of its tokens).

    Attributes:
        prompts: distinct prompt vectors, (P, d).
        prompt: row of each comparison's prompt, (n,) int64.
        responses: distinct response vectors, (R, d).
        response_1: row of the left response, (n,) int64.
        response_2: row of the right response, (n,) int64.
        user: number of the user, (n,) int64; -1 is a user whom the head does not know.
        y: -1, 0 or +1, (n,) float32.
        prompt_names: of the prompt vectors, (P,) int64, which noise goes by; None counts them.
        response_names: of the response vectors, (R,).
        comparison: where comparisons have several pairs of rows, m in all, of which comparison each is, (m,) int64, every
            one at least once and in order; `response_1` and `response_2` are then (m,), and `prompt` too where each pair
            has a prompt row of its own.
    """

    prompts: torch.Tensor
    prompt: torch.Tensor
    responses: torch.Tensor
    response_1: torch.Tensor
    response_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor
    prompt_names: torch.Tensor | None = None
    response_names: torch.Tensor | None = None
    comparison: torch.Tensor | None = None


Batch_co = TypeVar("Batch_co", covariant=True)


class ComparisonData(ABC, Generic[Batch_co]):
    """Base of comparisons and their vectors on one device.

    Abstract: a kind of data is a frozen dataclass with these fields among its own, of which every tensor has a row per
    comparison, and adds `batch`.

    Attributes:
        user: number of the user in `users`, (n,) int64; -1 where unknown.
        y: -1, 0 or +1, (n,) float32.
        users: ids of the users.
    """

    __slots__ = ()
    user: torch.Tensor
    y: torch.Tensor
    users: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    @property
    @abstractmethod
    def streamed(self) -> bool:
        """Vectors are read through the memory map, batch by batch."""

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.y.device

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """Return some of the comparisons, over the same vectors."""
        at = torch.from_numpy(rows).to(self.device)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        taken = {name: value[at] for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **taken)  # type: ignore[type-var]

    def with_users(self, users: Sequence[str]) -> Self:
        """Return the same comparisons with users numbered as in `users`; others become -1."""
        number = {user: i for i, user in enumerate(users)}
        table = torch.tensor([number.get(user, -1) for user in self.users] + [-1], device=self.device)
        return replace(self, user=table[self.user], users=tuple(users))  # type: ignore[type-var]

    @property
    def window(self) -> int | None:
        """Comparisons that are mixed, and whose vectors are read, at a time; None where vectors are few: then all are.

        It depends on the comparisons alone and not on whether their vectors are streamed, so that the same seed gives the
        same order on every machine.
        """
        size = self.vector_bytes(len(self))
        return max(1, min(WINDOW, WINDOW_BYTES * len(self) // size)) if size > LARGE_BYTES else None

    @abstractmethod
    def vector_bytes(self, n: int) -> int:
        """Return the bytes that the vectors of n comparisons take in memory, at most."""

    def gathered(self, rows: torch.Tensor) -> Self:
        """Return the same comparisons with the vectors of some of them, (n,), in memory: others may not be asked for."""
        del rows
        return self

    @abstractmethod
    def batch(self, rows: torch.Tensor) -> Batch_co:
        """Return some comparisons with what they need of the vectors, each once.

        Args:
            rows: row numbers on the data's device, (n,).
        """

    def batches(self, size: int) -> Iterator[Batch_co]:
        """Yield all comparisons in order, `size` at a time."""
        for rows in torch.split(torch.arange(len(self), device=self.device), size):
            yield self.batch(rows)


@final
@dataclass(frozen=True, slots=True, eq=False)
class PreferenceData(ComparisonData[PairBatch]):
    """Comparisons and their vectors on one device.

    Attributes:
        prompts: vectors of the distinct prompts.
        responses: vectors of the distinct responses.
        prompt: row of each comparison's prompt, (n,) int64.
        response_1: row of the left response, (n,).
        response_2: row of the right response, (n,).
        user: number of the user in `users`, (n,); -1 where unknown.
        y: -1, 0 or +1, (n,) float32.
        users: ids of the users.
        joint: response vectors are of prompt and response in one forward; prompts are then not read.
    """

    prompts: Table
    responses: Table
    prompt: torch.Tensor
    response_1: torch.Tensor
    response_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor
    users: tuple[str, ...]
    joint: bool = False

    @property
    def width(self) -> int:
        """Width of the vectors, d."""
        return self.prompts.width

    @property
    def streamed(self) -> bool:
        """Vectors are read through the memory map, batch by batch."""
        return self.prompts.streamed or self.responses.streamed

    def vector_bytes(self, n: int) -> int:
        """Return the bytes that the vectors of n comparisons take in memory, at most."""
        prompts = 0 if self.joint else min(n, len(self.prompts)) * self.prompts.row_bytes
        return prompts + min(2 * n, len(self.responses)) * self.responses.row_bytes

    def gathered(self, rows: torch.Tensor) -> PreferenceData:
        """Return the same comparisons with the vectors of some of them, (n,), in memory: others may not be asked for."""
        pair = torch.cat([self.response_1[rows], self.response_2[rows]])
        return replace(self, prompts=self.prompts.gathered(self.prompt[rows]), responses=self.responses.gathered(pair))

    def batch(self, rows: torch.Tensor) -> PairBatch:
        """Return some comparisons with each distinct vector once.

        Args:
            rows: row numbers on the data's device, (n,).
        """
        asked = self.prompt[rows]
        first = asked.new_zeros(1)  # of joint items no prompt is read: one row stands for all
        prompts, prompt, prompt_names = (
            (self.prompts.take(first), torch.zeros_like(asked), first) if self.joint else take_rows(self.prompts, asked)
        )
        pair = torch.cat([self.response_1[rows], self.response_2[rows]])
        responses, response, response_names = take_rows(self.responses, pair)
        n = len(rows)
        return PairBatch(
            prompts,
            prompt,
            responses,
            response[:n],
            response[n:],
            self.user[rows],
            self.y[rows],
            prompt_names=prompt_names,
            response_names=response_names,
        )


def load_preferences(
    cache: Cache, stored: StoredComparisons, *, space: str | None = None, device: str = "auto"
) -> PreferenceData:
    """Return a table's comparisons with their vectors on a device.

    Args:
        cache: the cache.
        stored: a comparison table of it.
        space: which encoder's vectors, where the table has several.
        device: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        MismatchError: texts of the table are not in the cache.
        NumericsError: a vector is not finite; streamed vectors are checked as they are read.
    """
    where = resolve_device(device)
    prompt_id, response_id = spaces_of(stored, space, cache)
    spaces = cache.space(prompt_id), cache.space(response_id)
    rows = [
        find_rows(spaces[0], stored.prompt_keys, "prompts", stored.name, cache),
        find_rows(spaces[1], stored.response_keys, "responses", stored.name, cache),
    ]
    needed = sum(4 * len(r) * s.width for r, s in zip(rows, spaces, strict=True))
    resident = needed <= MEMORY_SHARE * free_memory(where)
    table = stored.comparisons
    return PreferenceData(
        prompts=VectorTable(spaces[0], rows[0], where, resident=resident),
        responses=VectorTable(spaces[1], rows[1], where, resident=resident),
        prompt=on_device(table.prompts.codes, where),
        response_1=on_device(table.response_1, where),
        response_2=on_device(table.response_2, where),
        user=on_device(table.users.codes, where),
        y=torch.from_numpy(table.y.astype(np.float32)).to(where),
        users=tuple(table.users.values.to_pylist()),
    )


def on_device(numbers: npt.NDArray[np.integer[Any]], device: torch.device) -> torch.Tensor:
    """Return whole numbers on a device, as int64."""
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).to(device)
