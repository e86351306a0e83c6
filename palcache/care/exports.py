"""Vectors of a cache for other tools: safetensors, Parquet and npy, with their keys and, where tables hold them, texts.

Everything is read and written block by block, so memory stays flat however large a space is.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from palcache.cache import Cache, Space
from palcache.configs import ExportFormat
from palcache.errors import InputError
from palcache.files import storage_errors, write_bytes, write_with
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json, hex_key
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.indexes import KeyIndex
from palcache.storage.references import known_items

BLOCK: Final = 16_384
BLOCK_TOKENS: Final = 65_536
"""Rows, and kept tokens, read and written at a time."""
_SAFETENSORS: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
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
        job = _Job.of(space, tables, folder)
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


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Array:
    """An array to write: its name, type and shape, and its blocks in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A space to write: its usable rows in order, the texts by column, and which of them belongs to each row (-1 none)."""

    space: Space
    rows: _Rows
    keys: Keys
    texts: Mapping[str, pa.Array]
    text_at: _Rows
    token_offsets: _Rows
    stem: Path

    @classmethod
    def of(cls, space: Space, tables: Sequence[StoredComparisons], folder: Path) -> _Job:
        rows = np.sort(space.index.positions)
        keys = np.concatenate([*(shard.keys for shard in space.shards), np.empty((0, KEY_BYTES), np.uint8)])[rows]
        items = known_items(tables, space.role)
        at = KeyIndex.build(items.keys).find(keys)
        texts = {"text": items.texts} if items.prompts is None else {"text": items.texts, "prompt": items.prompts}
        counts = space.token_lengths(rows) if "tokens" in space.spec else np.zeros(len(rows), np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return cls(space, rows, keys, texts, at, offsets, folder / f"{space.role}-{space.space_id[:8]}")

    @property
    def keeps_tokens(self) -> bool:
        return "tokens" in self.space.spec

    @property
    def about(self) -> dict[str, str]:
        return {"space_id": self.space.space_id, "spec": canonical_json(self.space.spec).decode()}

    def path(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)

    def ranges(self) -> Iterator[slice]:
        """Yield the rows in turn, `BLOCK` at a time and no more than `BLOCK_TOKENS` kept tokens, but a row at least."""
        start = 0
        while start < len(self.rows):
            within = np.searchsorted(self.token_offsets, self.token_offsets[start] + BLOCK_TOKENS, side="right") - 1
            stop = min(start + BLOCK, max(start + 1, int(within)), len(self.rows))
            yield slice(start, stop)
            start = stop

    def text_block(self, name: str, part: slice) -> pa.Array:
        at = self.text_at[part]
        return self.texts[name].take(pa.array(at, mask=at < 0))

    def each(self, read: Callable[[_Rows], torch.Tensor]) -> Callable[[], Iterator[torch.Tensor]]:
        """Return what yields a block for each range of rows."""
        return lambda: (read(self.rows[part]) for part in self.ranges())

    def arrays(self) -> list[_Array]:
        """Return what is written of the rows besides their texts."""
        space, n, tokens = self.space, len(self.rows), int(self.token_offsets[-1])
        kind = space.rows(self.rows[:0]).dtype
        vectors = (n, space.width)
        found = [
            _Array("vectors", kind, vectors, self.each(space.rows)),
            _Array("keys", torch.uint8, (n, KEY_BYTES), functools.partial(_once, torch.from_numpy(self.keys.copy()))),
        ]
        if space.spec.get("prompt_state"):
            found.append(
                _Array("prompt_vectors", kind, vectors, self.each(lambda rows: space.rows(rows, which="prompt")))
            )
        if self.keeps_tokens:
            states, ids = (
                self.each(lambda rows: space.tokens(rows)[0]),
                self.each(lambda rows: space.token_ids(rows)[0].int()),
            )
            offsets = torch.from_numpy(self.token_offsets)
            found += [
                _Array("token_values", kind, (tokens, space.width), states),
                _Array("token_ids", torch.int32, (tokens,), ids),
                _Array("token_offsets", torch.int64, (n + 1,), functools.partial(_once, offsets)),
            ]
        return found


def _plain(values: torch.Tensor) -> npt.NDArray[Any]:
    """Return values as numpy has them; bfloat16 becomes float32, which holds every value of it."""
    array: npt.NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.ascontiguousarray(array)


def _text_arrays(job: _Job) -> Iterator[_Array]:
    """Yield texts as bytes and where each begins; a missing one is empty."""
    for name in job.texts:
        blocks = [pc.fill_null(pc.binary_length(job.text_block(name, part)), 0).to_numpy() for part in job.ranges()]
        counts = np.concatenate([*blocks, np.empty(0, np.int64)])
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        read = functools.partial(_text_blocks, job, name)
        yield _Array(f"{name}_bytes", torch.uint8, (int(offsets[-1]),), read)
        yield _Array(f"{name}_offsets", torch.int64, (len(offsets),), functools.partial(_once, offsets))


def _text_blocks(job: _Job, name: str) -> Iterator[torch.Tensor]:
    for part in job.ranges():
        content = "".join(text or "" for text in job.text_block(name, part).to_pylist()).encode()
        yield torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _once(values: torch.Tensor) -> Iterator[torch.Tensor]:
    yield values


def _write_safetensors(job: _Job) -> list[Path]:
    """Write one file: the length of a JSON header (u64), the header, then the arrays, those of wide values first."""
    arrays = sorted([*job.arrays(), *_text_arrays(job)], key=lambda array: -array.dtype.itemsize)
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
    return pa.FixedSizeListArray.from_arrays(pa.array(_plain(values).reshape(-1)), width)


def _write_parquet(job: _Job) -> list[Path]:
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


def _write_npy(job: _Job) -> list[Path]:
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


def _write_array(job: _Job, array: _Array) -> Path:
    dtype = _plain(torch.empty(0, dtype=array.dtype)).dtype

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file,
                {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape},
            )
            for block in array.blocks():
                file.write(_plain(block).data)

    path = job.path(f".{array.name}.npy")
    write_with(path, write)
    return path
