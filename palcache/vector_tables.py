"""Rows of vectors, found by their position: on a device, or read batch by batch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.cache import Space
from palcache.errors import NumericsError
from palcache.storage.spaces import TORCH_DTYPES, Which

WHOLE_SHARE: Final = 0.9
"""A table is projected whole where at least this share of its rows is expected in a batch."""
REPEATS: Final = 0.8
"""Repeated rows of a batch are sought where no more than this share of its references is expected to be distinct."""
ROWS: Final = 16
"""Distinct rows are padded to multiples of this."""
LOAD_ROWS: Final = 16_384
"""Vectors that are read, checked and moved at a time."""


class Table(Protocol):
    """Rows of float32 vectors, found by their position."""

    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def width(self) -> int:
        """Width of the vectors, d."""

    @property
    def streamed(self) -> bool:
        """Vectors are read batch by batch."""

    @property
    def resident(self) -> torch.Tensor | None:
        """All vectors, (m, d), where they are at hand."""

    @property
    def row_bytes(self) -> int:
        """Bytes that a vector takes when it is read ahead."""

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return vectors by their position, (n,) -> (n, d) float32."""

    def gathered(self, index: torch.Tensor) -> Table:
        """Return the same table with the vectors at some positions, (n,), in memory, from which alone it is then read."""


@final
class VectorTable:
    """Rows of float32 vectors on a device: resident, or read batch by batch through the memory map.

    Args:
        space: where the vectors are.
        rows: the table's rows in the space, (m,).
        device: where batches are wanted.
        resident: keep all vectors on the device.
        which: of a joint space, the items' vectors or the states at the ends of their prompts.
    """

    def __init__(
        self,
        space: Space,
        rows: npt.NDArray[np.int64],
        device: torch.device,
        *,
        resident: bool,
        which: Which = "pooled",
    ) -> None:
        self.width, self.device, self._which = space.width, device, which
        self._space, self._rows = space, torch.from_numpy(rows)
        self._resident = self._read_all(self._rows, torch.float32) if resident else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def streamed(self) -> bool:
        """Vectors are read through the memory map, batch by batch."""
        return self._resident is None

    @property
    def resident(self) -> torch.Tensor | None:
        """All vectors, (m, d), where they are on the device."""
        return self._resident

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector in its stored type."""
        return self.width * TORCH_DTYPES[self._space.dtype].itemsize

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return vectors by their position in this table, (n,) -> (n, d) float32."""
        if self._resident is not None:
            return torch.index_select(self._resident, 0, index)
        return self._read(self._rows[index.cpu()]).float()

    def gathered(self, index: torch.Tensor) -> Table:
        """Return the same table with the vectors at some positions, (n,), on the device; a resident one as it is.

        They are read in the order of the space, each once, and stay in their stored type.

        Raises:
            NumericsError: a vector is not finite.
        """
        if self._resident is not None:
            return self
        rows = torch.unique(self._rows[index.cpu()])
        stored = TORCH_DTYPES[self._space.dtype]
        return GatheredTable(self._rows_there, rows.to(self.device), self._read_all(rows, stored))

    @functools.cached_property
    def _rows_there(self) -> torch.Tensor:
        """The rows of all positions, on the device."""
        return self._rows.to(self.device)

    def _read_all(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return vectors by their row in the space, (m, d) on the device, with no more than a few of them elsewhere."""
        out = torch.empty(len(rows), self.width, dtype=dtype, device=self.device)
        for some, part in zip(torch.split(rows, LOAD_ROWS), torch.split(out, LOAD_ROWS), strict=True):
            part.copy_(self._read(some))
        return out

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        """Return vectors by their row in the space, (n,) -> (n, d), in their stored type."""
        self._space.read_ahead(rows, which=self._which)
        vectors = self._space.rows(rows, which=self._which)
        refuse_non_finite(vectors, self._space, rows)
        return vectors.to(self.device)


@final
@dataclass(frozen=True, slots=True, eq=False)
class GatheredTable:
    """Part of a `VectorTable` in memory: positions are the table's own, and only those gathered may be asked for.

    Attributes:
        rows: in the space, of every position, (N,) int64.
        held: rows whose vectors are held, ascending, (m,) int64.
        vectors: of these, (m, d), in their stored type.
    """

    rows: torch.Tensor
    held: torch.Tensor
    vectors: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Width of the vectors, d."""
        return int(self.vectors.shape[-1])

    @property
    def streamed(self) -> bool:
        """The vectors are in memory."""
        return False

    @property
    def resident(self) -> None:
        """Not all vectors are at hand."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector."""
        return self.width * self.vectors.element_size()

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return vectors by their position in the table, (n,) -> (n, d) float32; each must have been gathered."""
        wanted = self.rows[index]
        found = torch.searchsorted(self.held, wanted)
        if wanted.device.type == "cpu" and not torch.equal(self.held[found.clamp(max=len(self.held) - 1)], wanted):
            raise IndexError("Got a position whose vector was not gathered; gather all that a batch refers to.")
        return torch.index_select(self.vectors, 0, found).float()

    def gathered(self, index: torch.Tensor) -> Table:
        """Return this table: what is asked for must be held."""
        del index
        return self


@final
@dataclass(frozen=True, slots=True, eq=False)
class TensorTable:
    """Rows of float32 vectors at hand, (m, d), with the interface of `VectorTable`."""

    vectors: torch.Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Width of the vectors, d."""
        return int(self.vectors.shape[-1])

    @property
    def streamed(self) -> bool:
        """The vectors are in memory."""
        return False

    @property
    def resident(self) -> torch.Tensor:
        """All vectors, (m, d)."""
        return self.vectors

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector."""
        return self.width * self.vectors.element_size()

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return vectors by their position in this table, (n,) -> (n, d)."""
        return torch.index_select(self.vectors, 0, index)

    def gathered(self, index: torch.Tensor) -> Table:
        """Return this table: its vectors are in memory."""
        del index
        return self


def refuse_non_finite(vectors: torch.Tensor, space: Space, rows: torch.Tensor) -> None:
    """Raise NumericsError where a vector is not finite, naming its row in the space.

    Args:
        vectors: (n, d).
        space: where they come from.
        rows: the row of each, (n,).
    """
    good = torch.isfinite(vectors).all(dim=1)
    if not bool(good.all()):
        first = int(rows[int(torch.nonzero(~good)[0])])
        raise NumericsError(
            f"The vector of row {first} in the {space.role} space {space.space_id[:8]} is not finite; run palcache cache "
            "verify on the cache, and embed again with --compute-dtype float32."
        )


class RowPlan(Enum):
    """Which rows of a table are read and projected for the references of a batch."""

    WHOLE = "the whole table, which is hardly longer than what a batch refers to"
    DISTINCT = "each distinct row once"
    OWN = "a row per reference: few repeat, and finding them costs more than it saves"

    @classmethod
    def of(cls, rows: int, references: int) -> RowPlan:
        """Return the plan of a table of some rows for some references; it depends on nothing else."""
        if expected_distinct(rows, references) > WHOLE_SHARE * rows:
            return cls.WHOLE
        return cls.DISTINCT if padded_distinct(rows, references) < REPEATS * references else cls.OWN


def expected_distinct(rows: int, references: int) -> float:
    """Return how many of the rows so many random references name on average."""
    return rows * -math.expm1(-references / rows) if rows else 0.0


def padded_distinct(rows: int, references: int) -> int:
    """Return to how many rows the distinct ones of a batch are padded: more than random references name.

    So one number of rows goes into the sums of every batch and every head, alone or in a stack of heads, and sums over
    rows are the same to the last bit. (Five deviations above the mean of the occupancy of `rows` boxes by `references` balls;
    Feller, An Introduction to Probability Theory, vol. 1. A batch that names more is not cut.)
    """
    load = references / max(rows, 1)
    empty = math.exp(-load)
    variance = rows * empty * (1 - (1 + load) * empty)
    most = expected_distinct(rows, references) + 5 * math.sqrt(max(variance, 0.0))
    return min(rows, references, -(-math.ceil(most) // ROWS) * ROWS)


def take_rows(table: Table, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the vectors that references name, (m, d), where each reference stands among them, (n,), and their positions.

    On a CPU distinct rows are padded by rows that no reference names.

    Args:
        table: the vectors.
        index: references: positions in the table, (n,).
    """
    plan = RowPlan.of(len(table), len(index))
    if plan is RowPlan.WHOLE and table.resident is not None:
        return table.resident, index, torch.arange(len(table), device=index.device)
    if plan is RowPlan.OWN:
        return table.take(index), torch.arange(len(index), device=index.device), index
    distinct, inverse = torch.unique(index, return_inverse=True)
    if index.device.type == "cpu":
        distinct = pad_positions(distinct, padded_distinct(len(table), len(index)))
    return table.take(distinct), inverse, distinct


def pad_positions(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Return positions, (m,), filled up to a length with the first of them; longer ones as they are."""
    missing = length - len(positions)
    return torch.cat([positions, positions[:1].expand(missing)]) if missing > 0 else positions
