"""Vectors of a cache for other tools: safetensors, Parquet and npy, with their keys and, where tables hold them, texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import torch

from palcache.cache import Cache, Space
from palcache.comparison_files import StoredComparisons
from palcache.configs import ExportFormat
from palcache.errors import InputError
from palcache.files import storage_errors, write_bytes, write_with
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json, hex_key
from palcache.indexes import KeyIndex
from palcache.references import known_items

BLOCK: Final = 16_384
"""Rows read and written at a time."""
OnRows = Callable[[int, int], None]
_Rows = npt.NDArray[np.int64]


@final
@dataclass(frozen=True, slots=True)
class Export:
    """What was written of one space.

    Attributes:
        space_id: the space.
        role: `prompt`, `response` or `joint`.
        rows: vectors written; failed rows and repeats are left out.
        texts: how many of them have a text in one of the cache's tables.
        paths: the files.
    """

    space_id: str
    role: str
    rows: int
    texts: int
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
    stands beside it as `prompt`; token states and states at the prompt's end are not exported. A row without a text in any
    table has an empty one (null in Parquet and JSON).

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
        job = _Job.of(space, tables, folder)
        paths = {"safetensors": _write_safetensors, "parquet": _write_parquet, "npy": _write_npy}[form](job)
        done += len(job.rows)
        if on_rows:
            on_rows(done, total)
        texts = int((job.text_at >= 0).sum())
        out.append(Export(space.space_id, space.role, len(job.rows), texts, tuple(paths)))
    return out


def _choose(cache: Cache, wanted: Sequence[str]) -> list[str]:
    fits = {name: [s for s in cache.space_ids if s.startswith(name) or cache.space(s).role == name] for name in wanted}
    for name, found in fits.items():
        if not found:
            have = ", ".join(f"{space_id[:8]} ({cache.space(space_id).role})" for space_id in cache.space_ids) or "none"
            raise InputError(f"Got --space {name}; {cache.path} has the spaces {have}.")
    return sorted({space_id for found in fits.values() for space_id in found}) if wanted else cache.space_ids


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A space to write: its usable rows in order, the texts by column, and which of them belongs to each row (-1 none)."""

    space: Space
    rows: _Rows
    keys: Keys
    texts: Mapping[str, pa.Array]
    text_at: _Rows
    stem: Path

    @classmethod
    def of(cls, space: Space, tables: Sequence[StoredComparisons], folder: Path) -> _Job:
        rows = np.sort(space.index.positions)
        keys = np.concatenate([*(shard.keys for shard in space.shards), np.empty((0, KEY_BYTES), np.uint8)])[rows]
        items = known_items(tables, space.role)
        at = KeyIndex.build(items.keys).find(keys)
        texts = {"text": items.texts} if items.prompts is None else {"text": items.texts, "prompt": items.prompts}
        return cls(space, rows, keys, texts, at, folder / f"{space.role}-{space.space_id[:8]}")

    def path(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)

    def text_block(self, name: str, start: int) -> pa.Array:
        at = self.text_at[start : start + BLOCK]
        return self.texts[name].take(pa.array(at, mask=at < 0))

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(self.rows), BLOCK):
            yield start, self.space.rows(self.rows[start : start + BLOCK])


def _plain(vectors: torch.Tensor) -> npt.NDArray[Any]:
    """Return vectors as numpy has them; bfloat16 becomes float32, which holds every value of it."""
    array: npt.NDArray[Any] = (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()
    return array


def _write_safetensors(job: _Job) -> list[Path]:
    from safetensors.torch import save_file

    tensors = {"vectors": job.space.rows(job.rows), "keys": torch.from_numpy(job.keys.copy())}
    for name in job.texts:
        blocks = [job.text_block(name, start).to_pylist() for start in range(0, len(job.rows), BLOCK)]
        texts = [(text or "").encode() for block in blocks for text in block]
        counts = np.array([len(text) for text in texts], np.int64)
        tensors[f"{name}_bytes"] = torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy())
        tensors[f"{name}_offsets"] = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    about = {"space_id": job.space.space_id, "spec": canonical_json(job.space.spec).decode()}
    path = job.path(".safetensors")
    write_with(path, lambda temporary: save_file(tensors, temporary, metadata=about))
    return [path]


def _write_parquet(job: _Job) -> list[Path]:
    kind = {torch.float16: pa.float16()}.get(job.space.rows(job.rows[:0]).dtype, pa.float32())
    texts = [(name, pa.large_string()) for name in job.texts]
    columns = [("key", pa.binary(KEY_BYTES)), *texts, ("vector", pa.list_(kind, job.space.width))]
    about = {"space_id": job.space.space_id, "spec": canonical_json(job.space.spec).decode()}
    schema = pa.schema(columns, metadata=about)

    def write(temporary: Path) -> None:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as file:
            for start, vectors in job.blocks():
                keys = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(KEY_BYTES), len(vectors), [None, pa.py_buffer(job.keys[start : start + len(vectors)].tobytes())]
                )  # fmt: skip
                values = pa.FixedSizeListArray.from_arrays(pa.array(_plain(vectors).reshape(-1)), job.space.width)
                blocks = [job.text_block(name, start) for name in job.texts]
                file.write_table(pa.table([keys, *blocks, values], schema=schema))

    path = job.path(".parquet")
    write_with(path, write)
    return [path]


def _write_npy(job: _Job) -> list[Path]:
    shape = (len(job.rows), job.space.width)

    def write_vectors(temporary: Path) -> None:
        dtype = _plain(job.space.rows(job.rows[:0])).dtype
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            )
            for _, vectors in job.blocks():
                file.write(np.ascontiguousarray(_plain(vectors)).tobytes())

    def write_keys(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, job.keys, allow_pickle=False)

    def write_texts(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for start in range(0, len(job.rows), BLOCK):
                blocks = [job.text_block(name, start).to_pylist() for name in job.texts]
                for row, texts in enumerate(zip(*blocks, strict=True), start):
                    line = {"key": hex_key(job.keys[row]), **dict(zip(job.texts, texts, strict=True))}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    paths = [job.path(ending) for ending in (".vectors.npy", ".keys.npy", ".texts.jsonl", ".json")]
    for path, write in zip(paths[:3], (write_vectors, write_keys, write_texts), strict=True):
        write_with(path, write)
    write_bytes(paths[3], canonical_json({"space_id": job.space.space_id, "spec": dict(job.space.spec)}) + b"\n")
    return paths
