"""Hidden states at every token of many texts, ragged: in memory, or read batch by batch through the memory map.

Row i is a text; its states stand one after the other and are never padded. A text without any token, as truncation may
leave one, has one state of zeros where a state is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.cache import Space
from palcache.storage.spaces import TORCH_DTYPES
from palcache.vector_tables import Table, refuse_non_finite

TOKEN_BITS: Final = 24
"""A state's name is its row times 2^24 plus its token."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class RaggedRows:
    """States in memory.

    Attributes:
        values: all rows one after the other, (T, d), of any floating type.
        offsets: row i is values[offsets[i]:offsets[i + 1]], (N + 1,) int64, on the same device.
    """

    values: torch.Tensor
    offsets: torch.Tensor

    @property
    def width(self) -> int:
        """Width of the states, d."""
        return int(self.values.shape[-1])

    @property
    def streamed(self) -> bool:
        """The states are in memory."""
        return False

    @property
    def row_bytes(self) -> int:
        """Bytes of a state."""
        return self.width * self.values.element_size()

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row, (N,) int64."""
        return self.offsets.diff()

    def read(self, rows: torch.Tensor, first: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Return the states of tokens [first, stop) of some rows, one row after the other, (s, d)."""
        return self.values[run_places(self.offsets[rows] + first, stop - first)]


@final
class StreamedRows:
    """States in a cache, read when they are asked for.

    Args:
        space: keeps token states.
        rows: the texts' rows in it, (N,).
        device: where states are wanted.
    """

    def __init__(self, space: Space, rows: npt.NDArray[np.int64], device: torch.device) -> None:
        self._space, self._rows, self._device = space, torch.from_numpy(rows), device
        self.lengths = torch.from_numpy(space.token_lengths(rows)).to(device)

    @property
    def width(self) -> int:
        """Width of the states, d."""
        return self._space.width

    @property
    def streamed(self) -> bool:
        """States are read batch by batch."""
        return True

    @property
    def row_bytes(self) -> int:
        """Bytes of a state in its stored type."""
        return self.width * TORCH_DTYPES[self._space.dtype].itemsize

    def read(self, rows: torch.Tensor, first: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Return the states of tokens [first, stop) of some rows, one row after the other, (s, d).

        Raises:
            NumericsError: a state is not finite.
        """
        at = self._rows[rows.cpu()]
        values, offsets = self._space.tokens(at, first=first.cpu(), stop=stop.cpu(), ahead=True)
        refuse_non_finite(values, self._space, torch.repeat_interleave(at, offsets.diff()))
        return values.to(self._device)


StateRows = RaggedRows | StreamedRows


def load_rows(
    space: Space, rows: npt.NDArray[np.int64], device: torch.device, *, resident: bool
) -> RaggedRows | StreamedRows:
    """Return the token states of some rows of a space, on the device at once, in their stored type, or streamed.

    Raises:
        CacheError: the space keeps no token states.
        NumericsError: a state is not finite; streamed states are checked as they are read.
    """
    if not resident:
        return StreamedRows(space, rows, device)
    values, offsets = space.tokens(rows)
    refuse_non_finite(values, space, torch.repeat_interleave(torch.from_numpy(rows), offsets.diff()))
    return RaggedRows(values.to(device), offsets.to(device))


def take_states(states: StateRows, rows: torch.Tensor, first: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """Return the states of tokens [first, stop) of some rows, one row after the other, (s, d), at least float32.

    Args:
        states: where they are.
        rows: (n,) int64.
        first: below the row's length, or 0 for a row without tokens, which has one state of zeros.
        stop: beyond `first`.
    """
    filled = states.lengths[rows] > 0
    found = states.read(rows[filled], first[filled], stop[filled])
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    if bool(filled.all()):
        return found
    counts = stop - first
    out = found.new_zeros(int(counts.sum()), states.width)
    out[torch.repeat_interleave(filled, counts)] = found
    return out


def take_positions(
    states: StateRows, rows: torch.Tensor, owner: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the states that some positions need, each read once, where each position's stands among them, and names.

    A position past a row's end has the row's last state.

    Args:
        states: where they are.
        rows: of some texts, (n,) int64; repeats are read once.
        owner: which of these texts each position is of, (q,) int64; every text has a position.
        at: positions, (q,) int64.

    Returns:
        States (s, d), the place of each position among them, (q,) int64, and names of the states by text and token, which
        noise goes by, (s,) int64.
    """
    distinct, inverse = torch.unique(rows, return_inverse=True)
    text = inverse[owner]
    at = at.minimum((states.lengths[distinct] - 1).clamp(min=0)[text])
    first = torch.zeros_like(distinct).scatter_reduce_(0, text, at, "amin", include_self=False)
    stop = torch.zeros_like(distinct).scatter_reduce_(0, text, at, "amax", include_self=False) + 1
    counts = stop - first
    begin = counts.cumsum(0) - counts
    names = torch.repeat_interleave(distinct << TOKEN_BITS, counts) + run_places(first, counts)
    return take_states(states, distinct, first, stop), at + (begin - first)[text], names


def run_places(begin: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the numbers begin[i], begin[i] + 1, ... of runs of given lengths, one run after the other, (s,) int64."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(begin - before, lengths) + torch.arange(int(lengths.sum()), device=begin.device)


@final
@dataclass(frozen=True, slots=True, eq=False)
class LastStates:
    """The last state of each row, with the interface of a table of vectors: on it published rewards are served.

    Attributes:
        states: of every token.
    """

    states: StateRows

    def __len__(self) -> int:
        return len(self.states.lengths)

    @property
    def width(self) -> int:
        """Width of the states, d."""
        return self.states.width

    @property
    def streamed(self) -> bool:
        """States are read batch by batch."""
        return self.states.streamed

    @property
    def resident(self) -> None:
        """Last states are gathered when they are asked for."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector in float32."""
        return 4 * self.width

    def gathered(self, index: torch.Tensor) -> Table:
        """Return this table: states are read when they are asked for."""
        del index
        return self

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return last states by their row, (n,) -> (n, d) float32; zeros for a row without tokens."""
        stop = self.states.lengths[index].clamp(min=1)
        return take_states(self.states, index, stop - 1, stop)
