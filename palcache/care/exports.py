"""Vectors of a cache for other tools: safetensors, Parquet and npy, with their keys and, where tables hold them, texts.

Everything is read and written block by block, so memory stays flat however large a space is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from palcache.cache import Cache
from palcache.care.export_jobs import ExportArray, ExportJob, plain, text_arrays
from palcache.configs import ExportFormat
from palcache.errors import InputError
from palcache.files import storage_errors, write_bytes, write_with
from palcache.fingerprints import KEY_BYTES, canonical_json, hex_key

_SAFETENSORS: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
OnRows = Callable[[int, int], None]


@final
@dataclass(frozen=True, slots=True)
class Export:
    """What was written of one space.

    Attributes:
        space_id: the space.
        role: `prompt`, `response` or `joint`.
        rows: vectors written; failed rows and repeats are left out.
        texts: how many of them have a text in one of the cache's tables.
        tokens: token states written; 0 where the space keeps none.
        paths: the files.
    """

    space_id: str
    role: str
    rows: int
    texts: int
    tokens: int
    paths: tuple[Path, ...]


def export_cache(
    cache: Cache,
    folder: Path,
    *,
    form: ExportFormat = "safetensors",
    spaces: Sequence[str] = (),
    on_rows: OnRows | None = None,
) -> list[Export]:
    """Write the usable vectors of spaces to `folder`, one name `<role>-<first 8 digits of the space>` per space.

    safetensors holds `vectors` in the stored type, `keys`, and the texts as `text_bytes` and `text_offsets`; Parquet the
    columns `key`, `text` and `vector`; npy gives `.vectors.npy`, `.keys.npy` and `.texts.jsonl`. Parquet and npy have no
    bfloat16: it is written as float32, and so is int8 everywhere. Of joint items `text` is the response, and the prompt
    stands beside it as `prompt`. A row without a text in any table has an empty one (null in Parquet and JSON).

    States at the prompt's end are `prompt_vectors` (Parquet: `prompt_vector`). Token states are `token_values` (t, d) with
    `token_ids` (t,) and `token_offsets` (n + 1,): those of row i are numbers offsets[i] to offsets[i + 1]; Parquet has lists
    `token_ids` and `token_states` a row.

    Args:
        cache: the cache.
        folder: made where it is missing; files of the same names are replaced.
        form: which format.
        spaces: beginnings of the ids of spaces, or roles; none means all.
        on_rows: called with the rows written and the rows in all.

    Raises:
        InputError: no space fits.
        StorageError: the disk is full or `folder` cannot be written.
    """
    chosen = [cache.space(space_id) for space_id in _choose(cache, spaces)]
    tables = [cache.comparisons(name) for name in cache.comparison_names]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    total, done, out = sum(len(space.index) for space in chosen), 0, []
    for space in chosen:
        job = ExportJob.of(space, tables, folder)
        paths = {"safetensors": _write_safetensors, "parquet": _write_parquet, "npy": _write_npy}[form](job)
        done += len(job.rows)
        if on_rows:
            on_rows(done, total)
        texts = int((job.text_at >= 0).sum())
        out.append(Export(space.space_id, space.role, len(job.rows), texts, int(job.token_offsets[-1]), tuple(paths)))
    return out


def _choose(cache: Cache, wanted: Sequence[str]) -> list[str]:
    fits = {name: [s for s in cache.space_ids if s.startswith(name) or cache.space(s).role == name] for name in wanted}
    for name, found in fits.items():
        if not found:
            have = ", ".join(f"{space_id[:8]} ({cache.space(space_id).role})" for space_id in cache.space_ids) or "none"
            raise InputError(f"Got --space {name}; {cache.path} has the spaces {have}.")
    return sorted({space_id for found in fits.values() for space_id in found}) if wanted else cache.space_ids


def _write_safetensors(job: ExportJob) -> list[Path]:
    """Write one file: the length of a JSON header (u64), the header, then the arrays, those of wide values first."""
    arrays = sorted([*job.arrays(), *text_arrays(job)], key=lambda array: -array.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": job.about}
    at = 0
    for array in arrays:
        end = at + math.prod(array.shape) * array.dtype.itemsize
        header[array.name] = {
            "dtype": _SAFETENSORS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays:
                for block in array.blocks():
                    file.write(block.contiguous().view(torch.uint8).numpy().data)

    path = job.path(".safetensors")
    write_with(path, write)
    return [path]


def _lists(values: torch.Tensor, width: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(plain(values).reshape(-1)), width)


def _write_parquet(job: ExportJob) -> list[Path]:
    space, width = job.space, job.space.width
    kind = {torch.float16: pa.float16()}.get(space.rows(job.rows[:0]).dtype, pa.float32())
    columns = [("key", pa.binary(KEY_BYTES)), *((name, pa.large_string()) for name in job.texts)]
    columns.append(("vector", pa.list_(kind, width)))
    if space.spec.get("prompt_state"):
        columns.append(("prompt_vector", pa.list_(kind, width)))
    if job.keeps_tokens:
        columns += [("token_ids", pa.list_(pa.int32())), ("token_states", pa.list_(pa.list_(kind, width)))]
    schema = pa.schema(columns, metadata=job.about)

    def block(part: slice) -> pa.Table:
        rows = job.rows[part]
        keys = pa.py_buffer(job.keys[part].tobytes())
        found = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(rows), [None, keys])]
        found += [job.text_block(name, part) for name in job.texts]
        found.append(_lists(space.rows(rows), width))
        if space.spec.get("prompt_state"):
            found.append(_lists(space.rows(rows, which="prompt"), width))
        if job.keeps_tokens:
            (states, offsets), (ids, _) = space.tokens(rows), space.token_ids(rows)
            begins = pa.array(offsets.numpy().astype(np.int32))
            found.append(pa.ListArray.from_arrays(begins, pa.array(ids.int().numpy())))
            found.append(pa.ListArray.from_arrays(begins, _lists(states, width)))
        return pa.table(found, schema=schema)

    def write(temporary: Path) -> None:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as file:
            for part in job.ranges():
                file.write_table(block(part))

    path = job.path(".parquet")
    write_with(path, write)
    return [path]


def _write_npy(job: ExportJob) -> list[Path]:
    paths = [_write_array(job, array) for array in job.arrays()]

    def write_texts(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for part in job.ranges():
                blocks = [job.text_block(name, part).to_pylist() for name in job.texts]
                for row, texts in enumerate(zip(*blocks, strict=True), part.start):
                    line = {"key": hex_key(job.keys[row]), **dict(zip(job.texts, texts, strict=True))}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    paths.insert(2, job.path(".texts.jsonl"))
    write_with(paths[2], write_texts)
    paths.append(job.path(".json"))
    write_bytes(paths[-1], canonical_json({"space_id": job.space.space_id, "spec": dict(job.space.spec)}) + b"\n")
    return paths


def _write_array(job: ExportJob, array: ExportArray) -> Path:
    dtype = plain(torch.empty(0, dtype=array.dtype)).dtype

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file,
                {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape},
            )
            for block in array.blocks():
                file.write(plain(block).data)

    path = job.path(f".{array.name}.npy")
    write_with(path, write)
    return path
