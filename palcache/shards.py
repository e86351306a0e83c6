"""One HDF5 file of vectors: its layout, its crash-safe writing and its checked reading.

h5py lays out the file once and closes it; rows are then filled through a memory map at the datasets' offsets, because
a process killed while it writes HDF5 leaves a file that cannot be opened. `docs/format.md` describes every dataset.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, final

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from palcache.configs import StoredDtype
from palcache.errors import CacheError
from palcache.files import storage_errors
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json

FORMAT: Final = "palcache-shard"
VERSION: Final = 1
BLOCK_ROWS: Final = 4_096
ALIGNMENT: Final = 4_096
TRUNCATED: Final = 1
FAILED: Final = 2
"""Bits of `/flags`: the text was longer than the model's limit; the text could not be encoded, its row is zero."""

FILE_DTYPES: Final[Mapping[str, str]] = MappingProxyType({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"})
POOLED: Final = "emb/pooled"
_SUMMED: Final = (POOLED, "norm", "key", "n_tokens", "flags")
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        space_id: digest of the encoder spec.
        spec: everything that changes the meaning of a vector.
        rows: number of rows, N.
        width: number of values in a vector, d.
        dtype: type of the stored vectors.
        versions: libraries and device that wrote the shard.
    """

    space_id: str
    spec: Mapping[str, Any]
    rows: int
    width: int
    dtype: StoredDtype
    versions: Mapping[str, str]


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


def create_shard(path: Path, header: ShardHeader, keys: Keys, n_tokens: npt.NDArray[np.uint32], flags: Array) -> None:
    """Create a complete, unsealed shard at `path` with its space on the disk reserved; only vectors are missing.

    Args:
        path: where; an existing file is replaced.
        header: its attributes.
        keys: row keys, (N, 16).
        n_tokens: tokens per row, (N,).
        flags: bits per row, (N,) uint8.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    n, blocks = header.rows, -(-header.rows // BLOCK_ROWS)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        POOLED: (FILE_DTYPES[header.dtype], (n, header.width)),
        "norm": ("<f4", (n,)),
        "key": ("|u1", (n, KEY_BYTES)),
        "n_tokens": ("<u4", (n,)),
        "flags": ("|u1", (n,)),
        "done": ("|u1", (n,)),
        "sealed": ("|u1", (1,)),
        **{_sum_name(name): ("<u8", (blocks,)) for name in _SUMMED},
    }
    with storage_errors(path):
        with h5py.File(path, "w", alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
            for name, (dtype, shape) in shapes.items():
                _create_dataset(file, name, dtype, shape)
            file[POOLED].attrs["logical_dtype"] = header.dtype
            file.attrs.update(
                format=FORMAT,
                version=VERSION,
                space_id=header.space_id,
                spec=canonical_json(header.spec).decode(),
                rows=n,
                versions=canonical_json(header.versions).decode(),
            )
        _reserve(path)
        arrays = _map_datasets(path, shared=True)
        arrays["key"][:], arrays["n_tokens"][:], arrays["flags"][:] = keys, n_tokens, flags


def _create_dataset(file: Any, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Create a contiguous dataset whose bytes lie in the file at once, so that its offset is known."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    folder, _, leaf = name.rpartition("/")
    parent = file.require_group(folder) if folder else file
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(parent.id, leaf.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, properties)


def _sum_name(dataset: str) -> str:
    return "sum/" + dataset.replace("/", ".")


def _reserve(path: Path) -> None:
    """Reserve the file's blocks now: a full disk is an error here and not a crash of the memory map later."""
    if hasattr(os, "posix_fallocate"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, path.stat().st_size)
        finally:
            os.close(descriptor)


def _map_datasets(path: Path, *, shared: bool) -> dict[str, Array]:
    """Return every dataset as an array over one memory map of the file.

    A shared map writes to the file. Otherwise the map is copy-on-write: readers need no lock, survive a fork, and a
    stray in-place write cannot reach the disk.
    """
    with h5py.File(path, "r") as file:
        places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}

        def visit(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                offset = node.id.get_offset()
                if node.chunks is not None or offset is None:
                    raise CacheError(f"{path}: the dataset {name} is not contiguous; write the cache anew.")
                places[name] = (offset, node.dtype, node.shape)

        file.visititems(visit)
    descriptor = os.open(path, os.O_RDWR if shared else os.O_RDONLY)
    try:
        if shared:
            buffer = mmap.mmap(descriptor, 0)
        else:
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            buffer = mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    return {
        name: np.frombuffer(buffer, dtype, int(np.prod(shape)), offset).reshape(shape)
        for name, (offset, dtype, shape) in places.items()
    }


@final
class ShardWriter:
    """Fills an unsealed shard row by row; what is marked done survives a kill of the process.

    Args:
        path: a file that `create_shard` made.

    Raises:
        CacheError: the file is not an unsealed shard, as after a kill in the middle of its creation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self._arrays = _open(path, shared=True)

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

    def fail(self, row: int) -> None:
        """Mark a row as one that could not be encoded; its vector is zero and it is never found by its key."""
        self._arrays[POOLED][row] = 0
        self._arrays["norm"][row] = 0
        self._arrays["flags"][row] |= FAILED
        self._arrays["done"][row] = 1

    def seal(self) -> str:
        """Write the block sums and the seal; return the digest of the file, 16 hexadecimal digits.

        Raises:
            CacheError: a row is not done.
        """
        missing = len(self.pending())
        if missing:
            raise CacheError(f"{self.path}: {missing} of {self.header.rows} rows are not done, so it cannot be sealed.")
        for name in _SUMMED:
            self._arrays[_sum_name(name)][:] = _block_sums(self._arrays[name])
        self._arrays["sealed"][0] = 1
        return shard_digest(self.path)


def _block_sums(array: Array) -> npt.NDArray[np.uint64]:
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
        self.header, self._arrays = _open(path, shared=False)
        if not self._arrays["sealed"][0]:
            raise CacheError(f"{path} is not sealed, so its writer was stopped; run the same palcache embed again.")

    @property
    def keys(self) -> Keys:
        """The row keys, (N, 16)."""
        return self._arrays["key"]

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
        """Return every block whose bytes differ from those that were sealed; empty for a sound shard."""
        found = []
        for name in _SUMMED:
            bad = np.flatnonzero(_block_sums(self._arrays[name]) != self._arrays[_sum_name(name)])
            for block in bad.tolist():
                last = min((block + 1) * BLOCK_ROWS, self.header.rows)
                found.append(Damage(self.path, name, (block * BLOCK_ROWS, last)))
        if not found and shard_digest(self.path) != self.path.stem.rpartition("-")[2]:
            found.append(Damage(self.path, "file", (0, self.header.rows)))
        return found


def _open(path: Path, *, shared: bool) -> tuple[ShardHeader, dict[str, Array]]:
    try:
        with h5py.File(path, "r") as file:
            header = _read_header(file, path)
        arrays = _map_datasets(path, shared=shared)
        expected = {POOLED, "norm", "key", "n_tokens", "flags", "done", "sealed"}
        missing = expected - arrays.keys()
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CacheError(
            f"{path} cannot be read as a palcache shard ({error}); it is damaged or cut short: delete it and run the "
            "same palcache embed again."
        ) from error
    if missing:
        raise CacheError(f"{path} lacks the dataset(s) {', '.join(sorted(missing))}; delete it and embed again.")
    return header, arrays


def _read_header(file: Any, path: Path) -> ShardHeader:
    attributes = dict(file.attrs)
    if attributes.get("format") != FORMAT:
        raise CacheError(f"{path} is HDF5 but not a palcache shard.")
    version = int(attributes["version"])
    if version != VERSION:
        raise CacheError(
            f"{path} has format version {version}; this palcache reads version {VERSION}: install a palcache that reads "
            "it, or embed into a new folder."
        )
    emb = file[POOLED]
    return ShardHeader(
        space_id=str(attributes["space_id"]),
        spec=json.loads(attributes["spec"]),
        rows=int(attributes["rows"]),
        width=int(emb.shape[1]),
        dtype=emb.attrs["logical_dtype"],
        versions=json.loads(attributes["versions"]),
    )
