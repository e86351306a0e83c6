"""One shard of vectors: filled row by row so that a kill loses nothing, sealed with sums, read without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import numpy.typing as npt
import xxhash

from palcache.errors import CacheError
from palcache.fingerprints import Keys
from palcache.layouts import BLOCK_ROWS, POOLED, SUMMED, Array, open_shard, sum_name

TRUNCATED: Final = 1
FAILED: Final = 2
"""Bits of `/flags`: the text was longer than the model's limit; the text could not be encoded, its row is zero."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A block of a shard whose bytes are not those that were written.

    Attributes:
        path: the shard.
        dataset: the dataset inside it, or `file` where the damage is outside all datasets.
        rows: first row and row after the last.
    """

    path: Path
    dataset: str
    rows: tuple[int, int]


@final
class ShardWriter:
    """Fills an unsealed shard row by row; what is marked done survives a kill of the process.

    Args:
        path: a file that `create_shard` made.

    Raises:
        CacheError: the file is damaged or of another format version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self._arrays = open_shard(path, shared=True)

    @property
    def keys(self) -> Keys:
        """The row keys, (N, 16)."""
        return self._arrays["key"]

    def pending(self) -> npt.NDArray[np.int64]:
        """Return the rows that are not done, in ascending order."""
        return np.flatnonzero(self._arrays["done"] == 0)

    def write(self, rows: Array, vectors: Array, norms: Array) -> None:
        """Store vectors and mark their rows done.

        Args:
            rows: row numbers, (m,).
            vectors: (m, d) in the shard's dtype; bfloat16 as its bits in uint16.
            norms: Euclidean norms of the vectors before they were stored, (m,) float32.
        """
        if vectors.dtype != self._arrays[POOLED].dtype:
            raise CacheError(f"{self.path}: got vectors of {vectors.dtype}, expected {self._arrays[POOLED].dtype}.")
        self._arrays[POOLED][rows] = vectors
        self._arrays["norm"][rows] = norms
        self._arrays["done"][rows] = 1

    def copy(self, to: Array, source: Mapping[str, Array], rows: Array) -> None:
        """Store rows of another shard as the rows `to`, every dataset of them, byte for byte, and mark them done."""
        for name in SUMMED:
            self._arrays[name][to] = source[name][rows]
        self._arrays["done"][to] = 1

    def fail(self, row: int) -> None:
        """Mark a row as one that could not be encoded; its vector is zero and it is never found by its key."""
        self._arrays[POOLED][row] = 0
        self._arrays["norm"][row] = 0
        self._arrays["flags"][row] |= FAILED
        self._arrays["done"][row] = 1

    def retry_failed(self) -> None:
        """Make rows that could not be encoded pending again."""
        failed = (self._arrays["flags"] & FAILED) != 0
        self._arrays["done"][failed] = 0
        self._arrays["flags"][failed] &= ~np.uint8(FAILED)

    def seal(self) -> str:
        """Write the block sums and the seal; return the digest of the file, 16 hexadecimal digits.

        Raises:
            CacheError: a row is not done.
        """
        missing = len(self.pending())
        if missing:
            raise CacheError(f"{self.path}: {missing} of {self.header.rows} rows are not done, so it cannot be sealed.")
        for name in SUMMED:
            self._arrays[sum_name(name)][:] = block_sums(self._arrays[name])
        self._arrays["sealed"][0] = 1
        return shard_digest(self.path)


def block_sums(array: Array) -> npt.NDArray[np.uint64]:
    """Return xxh3-64 of each `BLOCK_ROWS` rows of a dataset."""
    sums = [
        xxhash.xxh3_64_intdigest(np.ascontiguousarray(array[at : at + BLOCK_ROWS]).view(np.uint8).data)
        for at in range(0, len(array), BLOCK_ROWS)
    ]
    return np.array(sums, np.uint64)


def shard_digest(path: Path) -> str:
    """Return xxh3-64 of all bytes of a file, 16 hexadecimal digits: the second half of a sealed shard's name."""
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return str(state.hexdigest())


@final
class Shard:
    """A sealed shard, read through a copy-on-write memory map.

    Args:
        path: a sealed shard file.

    Raises:
        CacheError: the file is not a shard, is of another format version, or is not sealed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self._arrays = open_shard(path, shared=False)
        if not self._arrays["sealed"][0]:
            raise CacheError(f"{path} is not sealed, so its writer was stopped; run the same palcache embed again.")

    @property
    def keys(self) -> Keys:
        """The row keys, (N, 16)."""
        return self._arrays["key"]

    @property
    def row_data(self) -> dict[str, Array]:
        """Every dataset that holds something of each row, by name."""
        return {name: self._arrays[name] for name in SUMMED}

    @property
    def vectors(self) -> Array:
        """The stored vectors, (N, d); bfloat16 as its bits in uint16."""
        return self._arrays[POOLED]

    @property
    def norms(self) -> npt.NDArray[np.float32]:
        """Euclidean norms of the vectors before they were stored, (N,)."""
        return self._arrays["norm"]

    @property
    def n_tokens(self) -> npt.NDArray[np.uint32]:
        """Tokens per row, (N,)."""
        return self._arrays["n_tokens"]

    @property
    def flags(self) -> npt.NDArray[np.uint8]:
        """Bits per row, (N,): `TRUNCATED`, `FAILED`."""
        return self._arrays["flags"]

    def damage(self) -> list[Damage]:
        """Return what differs from the bytes that were sealed: blocks, or the file; empty for a sound shard."""
        if shard_digest(self.path) == self.path.stem.rpartition("-")[2]:
            return []
        found = []
        for name in SUMMED:
            bad = np.flatnonzero(block_sums(self._arrays[name]) != self._arrays[sum_name(name)])
            for block in bad.tolist():
                last = min((block + 1) * BLOCK_ROWS, self.header.rows)
                found.append(Damage(self.path, name, (block * BLOCK_ROWS, last)))
        return found or [Damage(self.path, "file", (0, self.header.rows))]
