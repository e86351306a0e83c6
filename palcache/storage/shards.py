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
from palcache.storage.datasets import (
    BLOCK_ROWS,
    COSINE,
    POOLED,
    PROMPT,
    SCALES,
    TOKENS,
    Array,
    sampled_rows,
    sum_name,
    summed_in,
)
from palcache.storage.layouts import open_shard

TRUNCATED: Final = 1
FAILED: Final = 2
"""Bits of `/flags`: the text was longer than the model's limit; the text could not be encoded, its row is zero."""
_PER_TOKEN: Final = (TOKENS, SCALES[TOKENS])
RAGGED: Final = (*_PER_TOKEN, "tok/ids")
"""Datasets with a row per kept token; the ids are known when a shard is created."""
_COPIED_TOKENS: Final = 65_536
"""Kept tokens whose states are copied at once."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A block of a shard whose bytes are not those that were written.

    Attributes:
        path: the shard.
        dataset: the dataset inside it, or `file` where the damage is outside all datasets.
        rows: first row and row after the last; of datasets per token (`tok/values`, `tok/ids`, `scale/tok`), tokens.
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

    def write(self, rows: Array, vectors: Array, norms: Array, more: Mapping[str, Array] | None = None) -> None:
        """Store vectors and mark their rows done.

        Args:
            rows: row numbers, (m,).
            vectors: (m, d) in the shard's dtype; bfloat16 as its bits in uint16.
            norms: Euclidean norms of the vectors before they were stored, (m,) float32.
            more: by dataset, values per row, (m, ...), or per kept token of these rows, row after row, (t, ...); the
                cosines of all these rows, of which the sample is kept.
        """
        if vectors.dtype != self._arrays[POOLED].dtype:
            raise CacheError(f"{self.path}: got vectors of {vectors.dtype}, expected {self._arrays[POOLED].dtype}.")
        self._arrays[POOLED][rows] = vectors
        self._arrays["norm"][rows] = norms
        for name, values in (more or {}).items():
            if name == COSINE:
                at, within = _sample(self.header.rows, rows)
                self._arrays[COSINE][at] = values[within]
            else:
                self._arrays[name][token_places(self._arrays["tok/offsets"], rows) if name in _PER_TOKEN else rows] = (
                    values
                )
        self._arrays["done"][rows] = 1

    def copy(self, to: Array, source: Mapping[str, Array], rows: Array) -> None:
        """Store rows of another shard as the rows `to`, every dataset of them, byte for byte, and mark them done.

        The shard was created for as many kept tokens. Of the cosines those are known that the other shard's sample has.
        """
        for name in summed_in(self._arrays):
            if name == COSINE:
                at, within = _sample(self.header.rows, to)
                self._arrays[COSINE][at] = _known_cosines(source, rows[within])
            elif name not in (*RAGGED, "tok/offsets"):
                self._arrays[name][to] = source[name][rows]
        if TOKENS in self._arrays:
            self._copy_tokens(to, source, rows)
        self._arrays["done"][to] = 1

    def _copy_tokens(self, to: Array, source: Mapping[str, Array], rows: Array) -> None:
        counts = source["tok/offsets"][rows + 1] - source["tok/offsets"][rows]
        block = np.cumsum(counts) // _COPIED_TOKENS
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(block)) + 1):
            at = token_places(self._arrays["tok/offsets"], to[part])
            taken = token_places(source["tok/offsets"], rows[part])
            for name in (name for name in RAGGED if name in self._arrays):
                self._arrays[name][at] = source[name][taken]

    def fail(self, row: int) -> None:
        """Mark a row as one that could not be encoded; its vector is zero and it is never found by its key."""
        for name in (POOLED, PROMPT, SCALES[POOLED], SCALES[PROMPT], "norm"):
            if name in self._arrays:
                self._arrays[name][row] = 0
        for name in (name for name in _PER_TOKEN if name in self._arrays):
            self._arrays[name][token_places(self._arrays["tok/offsets"], np.array([row]))] = 0
        if COSINE in self._arrays:
            self._arrays[COSINE][_sample(self.header.rows, np.array([row]))[0]] = np.nan
        self._arrays["flags"][row] |= FAILED
        self._arrays["done"][row] = 1

    def retry_failed(self) -> None:
        """Make rows that could not be encoded pending again."""
        failed = (self._arrays["flags"] & FAILED) != 0
        self._arrays["done"][failed] = 0
        self._arrays["flags"][failed] &= ~np.uint8(FAILED)

    def all_failed(self) -> bool:
        """Return whether no row could be encoded."""
        return bool(((self._arrays["flags"] & FAILED) != 0).all())

    def seal(self) -> str:
        """Write the block sums and the seal; return the digest of the file, 16 hexadecimal digits.

        Raises:
            CacheError: a row is not done.
        """
        missing = len(self.pending())
        if missing:
            raise CacheError(f"{self.path}: {missing} of {self.header.rows} rows are not done, so it cannot be sealed.")
        for name in summed_in(self._arrays):
            self._arrays[sum_name(name)][:] = block_sums(self._arrays[name])
        self._arrays["sealed"][0] = 1
        return shard_digest(self.path)


def _sample(total: int, rows: Array) -> tuple[Array, Array]:
    """Return where in the sample of a shard of `total` rows some rows stand, and which of them these are."""
    sample = sampled_rows(total)
    at = np.minimum(np.searchsorted(sample, rows), len(sample) - 1)
    within = sample[at] == rows
    return at[within], within


def _known_cosines(arrays: Mapping[str, Array], rows: Array) -> npt.NDArray[np.float32]:
    """Return the cosines of some rows of a shard, (m,); NaN outside its sample."""
    found = np.full(len(rows), np.nan, np.float32)
    if COSINE in arrays:
        at, within = _sample(len(arrays["key"]), rows)
        found[within] = arrays[COSINE][at]
    return found


def token_places(offsets: Array, rows: Array) -> Array:
    """Return the numbers of the kept tokens of some rows, row after row, (t,)."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    begins = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    places: Array = np.arange(int(lengths.sum())) + np.repeat(starts - begins, lengths)
    return places


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
        return {name: self._arrays[name] for name in summed_in(self._arrays)}

    def token_nbytes(self, rows: Array) -> Array:
        """Return the bytes of the kept token states of some rows, (m,); zeros where the shard keeps none."""
        if TOKENS not in self._arrays:
            return np.zeros(len(rows), np.int64)
        offsets, values = self._arrays["tok/offsets"], self._arrays[TOKENS]
        nbytes: Array = (offsets[rows + 1] - offsets[rows]) * (values.shape[1] * values.itemsize)
        return nbytes

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

    def dataset(self, name: str) -> Array:
        """Return a dataset by its name, as `docs/format.md` has it.

        Raises:
            CacheError: the shard does not have it.
        """
        if name not in self._arrays:
            raise CacheError(f"{self.path} has no dataset {name}; embed again with the options that keep it.")
        return self._arrays[name]

    @property
    def cosines(self) -> npt.NDArray[np.float32]:
        """Cosines of stored vectors to what was computed, over a sample of the rows, (s,); empty for float32."""
        found = self._arrays.get(COSINE, np.empty(0, np.float32))
        return found[np.isfinite(found)]

    def damage(self) -> list[Damage]:
        """Return what differs from the bytes that were sealed: blocks, or the file; empty for a sound shard."""
        if shard_digest(self.path) == self.path.stem.rpartition("-")[2]:
            return []
        found = []
        for name in (name for name in summed_in(self._arrays) if sum_name(name) in self._arrays):
            bad = np.flatnonzero(block_sums(self._arrays[name]) != self._arrays[sum_name(name)])
            for block in bad.tolist():
                last = min((block + 1) * BLOCK_ROWS, len(self._arrays[name]))
                found.append(Damage(self.path, name, (block * BLOCK_ROWS, last)))
        return found or [Damage(self.path, "file", (0, self.header.rows))]
