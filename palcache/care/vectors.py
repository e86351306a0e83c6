"""Vectors from elsewhere: `.npy`, safetensors and Parquet files of vectors and the ids by which tables name them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from palcache.errors import InputError
from palcache.fingerprints import text_keys
from palcache.storage.indexes import KeyIndex

BLOCK_ROWS: Final = 65_536
"""Rows looked through at once."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class NamedVectors:
    """Vectors and their ids, checked.

    Attributes:
        origin: the file they came from.
        ids: one text a vector, all different, a `large_string` array of length n.
        values: (n, d) float16, bfloat16 or float32; may be a memory map.
        index: from keys of ids to rows.
    """

    origin: Path
    ids: pa.Array
    values: torch.Tensor
    index: KeyIndex

    @property
    def width(self) -> int:
        """Number of values in a vector, d."""
        return int(self.values.shape[1])

    def find(self, ids: pa.Array) -> npt.NDArray[np.int64]:
        """Return the row of each id, (m,), and -1 where there is none."""
        return self.index.find(text_keys(ids))


def read_vectors(
    path: Path,
    *,
    ids: Path | None = None,
    id_column: str = "id",
    vector_column: str = "vector",
    tensor: str | None = None,
) -> NamedVectors:
    """Read a file of vectors.

    Args:
        path: `.npy` (n, d), `.safetensors`, or `.parquet` with a column of lists.
        ids: a file of n ids: `.txt` with one a line, `.json` with a list, `.npy` of texts or whole numbers, or `.parquet`
            with the id column; None for a Parquet file that holds its own.
        id_column: of a Parquet file.
        vector_column: of a Parquet file.
        tensor: name of the tensor in a safetensors file; None for the only one.

    Raises:
        InputError: a file is missing or broken, the vectors are no (n, d) numbers, a value is not finite, an id stands
            twice or is empty, or there are more or fewer ids than vectors.
    """
    for given in (path, ids):
        if given is not None and not given.is_file():
            raise InputError(f"There is no file {given}; expected a .npy, .safetensors or .parquet file of vectors.")
    try:
        values = _read_values(path, vector_column=vector_column, tensor=tensor)
        names = _read_ids(ids or path, id_column)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, pa.ArrowException, RuntimeError) as error:
        raise InputError(f"{path} cannot be read as vectors with ids ({error}); check that it is whole.") from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise InputError(f"{path} cannot be read as safetensors ({error}); check that it is whole.") from error
        raise
    return _checked(path, names, values)


def _read_values(path: Path, *, vector_column: str, tensor: str | None) -> torch.Tensor:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _as_tensor(np.load(path, mmap_mode="c", allow_pickle=False), path)
    if suffix == ".safetensors":
        return _read_safetensors(path, tensor)
    if suffix in {".parquet", ".pq"}:
        return _as_tensor(_read_lists(path, vector_column), path)
    raise InputError(f"The vectors {path} end in {path.suffix!r}; expected .npy, .safetensors or .parquet.")


def _as_tensor(array: npt.NDArray[Any], path: Path) -> torch.Tensor:
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {array.dtype}; expected numbers: float16, float32 or float64, of shape (n, d).")
    if array.dtype not in (np.float16, np.float32):
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def _read_safetensors(path: Path, name: str | None) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
        if name is None and len(names) != 1:
            raise InputError(f"{path} holds the tensors {', '.join(names) or 'none'}; choose one with --tensor.")
        if name is not None and name not in names:
            raise InputError(f"{path} has no tensor {name}; it has {', '.join(names) or 'none'}.")
        values: torch.Tensor = file.get_tensor(name or names[0])
    return values if values.dtype in {torch.float16, torch.bfloat16} else values.float()


def _read_lists(path: Path, column: str) -> npt.NDArray[Any]:
    lists = _read_column(path, column).combine_chunks()
    if not (
        pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type) or pa.types.is_fixed_size_list(lists.type)
    ):
        raise InputError(f"{path}: the column {column} holds {lists.type}; expected lists of numbers.")
    lengths = pc.list_value_length(lists)
    if lists.null_count or len(pc.unique(lengths)) > 1:
        row = pc.index(pc.not_equal(pc.fill_null(lengths, -1), lengths[0]), True).as_py()
        raise InputError(
            f"{path}, row {row + 1}: the vector has {lengths[row].as_py()} values; expected {lengths[0].as_py()}, as the "
            "first row has."
        )
    values: npt.NDArray[Any] = pc.list_flatten(lists).to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), -1)


def _read_column(path: Path, column: str) -> pa.ChunkedArray:
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise InputError(f"{path} has no column {column}; it has {', '.join(names)}: name the right one.")
        return file.read(columns=[column])[column]


def _read_ids(path: Path, column: str) -> pa.Array:
    """Return ids as texts; whole numbers are written in decimal."""
    suffix = path.suffix.lower()
    if suffix in {".parquet", ".pq"}:
        return _read_column(path, column).combine_chunks().cast(pa.large_string())
    if suffix == ".txt":
        return pa.array(path.read_text(encoding="utf-8").splitlines(), pa.large_string())
    if suffix == ".json":
        return pa.array([str(name) for name in json.loads(path.read_text(encoding="utf-8"))], pa.large_string())
    array = np.load(path, allow_pickle=False) if suffix == ".npy" else None
    if array is None or array.ndim != 1 or array.dtype.kind not in "iuU":
        raise InputError(
            f"{path} holds no ids; expected .txt with one a line, .json with a list, .npy of texts or whole numbers, or "
            ".parquet: name the file with --ids."
        )
    return pa.array(array.astype(str).tolist(), pa.large_string())


def _checked(path: Path, ids: pa.Array, values: torch.Tensor) -> NamedVectors:
    """Return vectors and ids that belong together.

    Raises:
        InputError: they do not, or one of them is no vector or no id.
    """
    if values.ndim != 2 or not values.shape[1]:
        raise InputError(f"{path} holds an array of shape {tuple(values.shape)}; expected (n, d), one vector a row.")
    if len(ids) != len(values):
        raise InputError(f"{path} holds {len(values)} vectors and there are {len(ids)} ids; expected as many of each.")
    empty = pc.fill_null(pc.equal(pc.binary_length(ids), 0), True)
    if pc.any(empty).as_py():
        raise InputError(f"{path}: the id of row {pc.index(empty, True).as_py() + 1} is empty; give every vector one.")
    index = KeyIndex.build(text_keys(ids))
    if len(index) < len(ids):
        rows = index.find(text_keys(ids))
        again = int(np.flatnonzero(rows != np.arange(len(ids)))[0])
        raise InputError(
            f"{path}: the id {ids[again].as_py()!r} stands in row {int(rows[again]) + 1} and in row {again + 1}; expected "
            "each id once."
        )
    for start in range(0, len(values), BLOCK_ROWS):
        good = torch.isfinite(values[start : start + BLOCK_ROWS]).all(dim=1)
        if not bool(good.all()):
            row = start + int(torch.nonzero(~good)[0])
            raise InputError(
                f"{path}: the vector {ids[row].as_py()!r} in row {row + 1} is not finite; mend it or leave it out."
            )
    return NamedVectors(path, ids, values, index)


def require_ids(vectors: NamedVectors, ids: pa.Array, what: Sequence[str]) -> None:
    """Refuse a table that names ids which have no vector.

    Args:
        vectors: what there is.
        ids: what a table names.
        what: the columns in which it does, for the message.

    Raises:
        InputError: an id is missing; the first one is named.
    """
    missing = np.flatnonzero(vectors.find(ids) < 0)
    if len(missing):
        raise InputError(
            f"{len(missing)} of {len(ids)} ids in {' and '.join(what)} have no vector in {vectors.origin} (the first is "
            f"{ids[int(missing[0])].as_py()[:80]!r}); name the columns that hold ids with --map, for example --map "
            f"{what[0]}={what[0]}_id."
        )
