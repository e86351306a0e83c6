"""The HDF5 side of a shard: its datasets, laid out once, and where in the file their bytes lie.

h5py lays out the file and closes it; rows are then filled and read through a memory map at the datasets' offsets,
because a process killed while it writes HDF5 leaves a file that cannot be opened.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast, get_args

import h5py
import numpy as np
import numpy.typing as npt

from palcache.configs import StoredDtype
from palcache.errors import CacheError, StorageError
from palcache.files import check_space, storage_errors
from palcache.fingerprints import Keys, canonical_json
from palcache.storage.datasets import (
    COSINE,
    FILE_DTYPES,
    POOLED,
    TOKENS,
    Array,
    ShardHeader,
    TokenRows,
    data_nbytes,
    dataset_shapes,
    sum_name,
)

__all__ = ["FILE_DTYPES", "ShardHeader", "create_shard", "dataset_places", "map_datasets", "open_shard"]

FORMAT: Final = "palcache-shard"
VERSION: Final = 1
ALIGNMENT: Final = 4_096
_METADATA_BYTES: Final = 256 << 10
"""What HDF5 takes at most beside the rows: some 40 objects, aligned."""
_AGAIN: Final = "delete it and run the same palcache embed again"
_Place = tuple[int, np.dtype[Any], tuple[int, ...]]


def create_shard(
    path: Path,
    header: ShardHeader,
    keys: Keys,
    n_tokens: npt.NDArray[np.uint32],
    flags: Array,
    *,
    prompt_tokens: npt.NDArray[np.uint32] | None = None,
    tokens: TokenRows | None = None,
) -> None:
    """Create an unsealed shard at `path` with its blocks on the disk reserved; only vectors are missing.

    The file is there with its keys, or not at all: it is made under a temporary name beside `path`.

    Args:
        path: where; an existing file is replaced.
        header: its attributes.
        keys: row keys, (N, 16).
        n_tokens: tokens per row, (N,).
        flags: bits per row, (N,) uint8.
        prompt_tokens: of joint items, tokens of the prompt per row, (N,).
        tokens: whose states are kept; None keeps none.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    known: dict[str, Array] = {"key": keys, "n_tokens": n_tokens, "flags": flags}
    if prompt_tokens is not None:
        known["n_prompt"] = prompt_tokens
    if tokens is not None:
        known |= {"tok/offsets": tokens.offsets, "tok/ids": tokens.ids}
    count = None if tokens is None else len(tokens.ids)
    draft = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        draft.unlink(missing_ok=True)
        check_space(draft, _METADATA_BYTES + data_nbytes(header, count))
        try:
            with h5py.File(draft, "w", locking=False, alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
                for name, (dtype, shape) in dataset_shapes(header, count).items():
                    _create_dataset(file, name, dtype, shape)
                _write_header(file, header)
            _reserve(draft)
            _, arrays = open_shard(draft, shared=True)
            for name, values in known.items():
                arrays[name][:] = values
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def _write_header(file: Any, header: ShardHeader) -> None:
    """Write the attributes, texts with a fixed length: a flipped bit among those of variable length can hang HDF5."""
    file[POOLED].attrs["logical_dtype"] = np.bytes_(header.dtype)
    texts = {
        "format": FORMAT.encode(),
        "space_id": header.space_id.encode(),
        "spec": canonical_json(header.spec),
        "versions": canonical_json(header.versions),
    }
    file.attrs.update({name: np.bytes_(text) for name, text in texts.items()}, version=VERSION, rows=header.rows)


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
            header, places = _read_places(file, path)
        arrays = map_datasets(path, places, shared=shared)
    except CacheError:
        raise
    except Exception as error:  # a flipped bit in HDF5's own bytes fails in a dozen ways
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{path} cannot be opened ({os.strerror(error.errno)}).") from error
        raise CacheError(
            f"{path} cannot be read as a palcache shard ({error}); it is damaged or cut short: {_AGAIN}."
        ) from error
    return header, arrays


def dataset_places(path: Path) -> Mapping[str, _Place]:
    """Return where in a sound shard each dataset's bytes begin, with its type and shape.

    Raises:
        CacheError: a dataset is not what the header says, or is not contiguous.
    """
    with h5py.File(path, "r", locking=False) as file:
        return _read_places(file, path)[1]


def _read_places(file: Any, path: Path) -> tuple[ShardHeader, dict[str, _Place]]:
    """Return what a shard says of itself, and where its datasets lie."""
    header = _read_header(file, path)
    shapes = dataset_shapes(header, int(file[TOKENS].shape[0]) if "tokens" in header.spec else None)
    if COSINE not in file:  # optional
        shapes = {name: expected for name, expected in shapes.items() if name not in {COSINE, sum_name(COSINE)}}
    return header, {name: _find_dataset(file, path, name, *expected) for name, expected in shapes.items()}


def _find_dataset(file: Any, path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> _Place:
    """Return where in the file a dataset's bytes begin, with its type and shape, which must be as expected."""
    dataset = h5py.h5d.open(file.id, name.encode())
    if (dataset.dtype, dataset.shape) != (np.dtype(dtype), shape):
        raise CacheError(
            f"{path}: got {dataset.dtype.str} {dataset.shape} for the dataset {name}, expected {dtype} {shape}; {_AGAIN}."
        )
    if 0 in shape:  # what holds nothing has no place
        return 0, np.dtype(dtype), shape
    offset = dataset.get_offset()
    if dataset.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS or offset is None:
        raise CacheError(f"{path}: the dataset {name} is not contiguous; {_AGAIN}.")
    return offset, np.dtype(dtype), shape


def map_datasets(path: Path, places: Mapping[str, _Place], *, shared: bool) -> dict[str, Array]:
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
    if _text(attributes.get("format", b"")) != FORMAT:
        raise CacheError(f"{path} is HDF5 but not a palcache shard.")
    version = int(attributes["version"])
    if version != VERSION:
        raise CacheError(
            f"{path} has format version {version}; this palcache reads version {VERSION}: install a palcache that reads "
            "it, or embed into a new folder."
        )
    emb = file[POOLED]
    dtype = _text(emb.attrs["logical_dtype"])
    if dtype not in get_args(StoredDtype):
        raise CacheError(f"{path}: got vectors of {dtype!r}, expected one of {', '.join(FILE_DTYPES)}; {_AGAIN}.")
    return ShardHeader(
        space_id=_text(attributes["space_id"]),
        spec=json.loads(attributes["spec"]),
        rows=int(attributes["rows"]),
        width=int(emb.shape[1]),
        dtype=cast(StoredDtype, dtype),
        versions=json.loads(attributes["versions"]),
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
