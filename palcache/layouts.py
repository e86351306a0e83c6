"""The HDF5 side of a shard: its datasets, laid out once, and where in the file their bytes lie.

h5py lays out the file and closes it; rows are then filled and read through a memory map at the datasets' offsets,
because a process killed while it writes HDF5 leaves a file that cannot be opened. `docs/format.md` describes every
dataset.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import h5py
import numpy as np
import numpy.typing as npt

from palcache.configs import StoredDtype
from palcache.errors import CacheError, StorageError
from palcache.files import storage_errors
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json

FORMAT: Final = "palcache-shard"
VERSION: Final = 1
BLOCK_ROWS: Final = 4_096
ALIGNMENT: Final = 4_096
FILE_DTYPES: Final[Mapping[str, str]] = MappingProxyType({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"})
POOLED: Final = "emb/pooled"
SUMMED: Final = (POOLED, "norm", "key", "n_tokens", "flags")
"""The datasets that have a sum per `BLOCK_ROWS` rows."""
Array = npt.NDArray[Any]
_Places = dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]


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


def create_shard(path: Path, header: ShardHeader, keys: Keys, n_tokens: npt.NDArray[np.uint32], flags: Array) -> None:
    """Create an unsealed shard at `path` with its blocks on the disk reserved; only vectors are missing.

    The file is there with its keys, or not at all: it is made under a temporary name beside `path`.

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
        **{sum_name(name): ("<u8", (blocks,)) for name in SUMMED},
    }
    draft = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            with h5py.File(draft, "w", locking=False, alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
                for name, (dtype, shape) in shapes.items():
                    _create_dataset(file, name, dtype, shape)
                _write_header(file, header)
            _reserve(draft)
            _, arrays = open_shard(draft, shared=True)
            arrays["key"][:], arrays["n_tokens"][:], arrays["flags"][:] = keys, n_tokens, flags
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def _write_header(file: Any, header: ShardHeader) -> None:
    file[POOLED].attrs["logical_dtype"] = header.dtype
    file.attrs.update(
        format=FORMAT,
        version=VERSION,
        space_id=header.space_id,
        spec=canonical_json(header.spec).decode(),
        rows=header.rows,
        versions=canonical_json(header.versions).decode(),
    )


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


def sum_name(dataset: str) -> str:
    """Return the name of the dataset that holds a dataset's sums."""
    return "sum/" + dataset.replace("/", ".")


def _reserve(path: Path) -> None:
    """Reserve the file's blocks now: a full disk is an error here and not a crash of the memory map later."""
    if hasattr(os, "posix_fallocate"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, path.stat().st_size)
        finally:
            os.close(descriptor)


def open_shard(path: Path, *, shared: bool) -> tuple[ShardHeader, dict[str, Array]]:
    """Return what a shard says of itself, and its datasets by name as arrays over one memory map.

    Args:
        path: a shard, sealed or not.
        shared: the map writes to the file; otherwise it is copy-on-write.

    Raises:
        CacheError: the file is not a shard, is of another format version, or is damaged.
        StorageError: the file cannot be opened.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            header, places = _read_header(file, path), _find_datasets(file, path)
        arrays = _map_datasets(path, places, shared=shared)
    except CacheError:
        raise
    except Exception as error:  # a flipped bit in HDF5's own bytes fails in a dozen ways
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{path} cannot be opened ({os.strerror(error.errno)}).") from error
        raise CacheError(
            f"{path} cannot be read as a palcache shard ({error}); it is damaged or cut short: delete it and run the "
            "same palcache embed again."
        ) from error
    wanted = {*SUMMED, *map(sum_name, SUMMED), "done", "sealed"}
    if missing := wanted - arrays.keys():
        raise CacheError(f"{path} lacks the dataset(s) {', '.join(sorted(missing))}; delete it and embed again.")
    return header, arrays


def dataset_places(path: Path) -> Mapping[str, tuple[int, np.dtype[Any], tuple[int, ...]]]:
    """Return where in a sound shard each dataset's bytes begin, with its type and shape.

    Raises:
        CacheError: a dataset is not contiguous.
    """
    with h5py.File(path, "r", locking=False) as file:
        return _find_datasets(file, path)


def _find_datasets(file: Any, path: Path) -> _Places:
    """Return where in the file each dataset's bytes begin, with its type and shape."""
    places: _Places = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            offset = node.id.get_offset()
            if node.chunks is not None or offset is None:
                raise CacheError(f"{path}: the dataset {name} is not contiguous; delete the file and embed again.")
            places[name] = (offset, node.dtype, node.shape)

    file.visititems(visit)
    return places


def _map_datasets(path: Path, places: _Places, *, shared: bool) -> dict[str, Array]:
    """Return datasets as arrays over one memory map of the file.

    A shared map writes to the file. Otherwise the map is copy-on-write: readers need no lock, survive a fork, and a
    stray in-place write cannot reach the disk.
    """
    with path.open("r+b" if shared else "rb") as file:
        if shared:
            buffer = mmap.mmap(file.fileno(), 0)
        else:
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            buffer = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return {
        name: np.frombuffer(buffer, dtype, int(np.prod(shape)), offset).reshape(shape)
        for name, (offset, dtype, shape) in places.items()
    }


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
