"""What of a space is exported: its usable rows with their keys and texts, and the arrays they make, block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from palcache.cache import Space
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.indexes import KeyIndex
from palcache.storage.references import known_items

BLOCK: Final = 16_384
BLOCK_TOKENS: Final = 65_536
"""Rows, and kept tokens, read and written at a time."""
_Rows = npt.NDArray[np.int64]


@final
@dataclass(frozen=True, slots=True, eq=False)
class ExportArray:
    """An array to write: its name, type and shape, and its blocks in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @classmethod
    def of(cls, name: str, values: torch.Tensor) -> ExportArray:
        """Return an array that is at hand, as one block."""
        return cls(name, values.dtype, tuple(values.shape), lambda: iter([values]))


@final
@dataclass(frozen=True, slots=True, eq=False)
class ExportJob:
    """A space to write: its usable rows in order, the texts by column, and which of them belongs to each row (-1 none)."""

    space: Space
    rows: _Rows
    keys: Keys
    texts: Mapping[str, pa.Array]
    text_at: _Rows
    token_offsets: _Rows
    stem: Path

    @classmethod
    def of(cls, space: Space, tables: Sequence[StoredComparisons], folder: Path) -> ExportJob:
        """Return the job of a space, with the texts that the cache's tables hold of it."""
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
        """The space has states of single tokens."""
        return "tokens" in self.space.spec

    @property
    def about(self) -> dict[str, str]:
        """What a file says of itself: the space and its spec."""
        return {"space_id": self.space.space_id, "spec": canonical_json(self.space.spec).decode()}

    def path(self, ending: str) -> Path:
        """Return the file with an ending."""
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
        """Return the texts of some rows in a column; null where there is none."""
        at = self.text_at[part]
        return self.texts[name].take(pa.array(at, mask=at < 0))

    def each(self, read: Callable[[_Rows], torch.Tensor]) -> Callable[[], Iterator[torch.Tensor]]:
        """Return what yields a block for each range of rows."""
        return lambda: (read(self.rows[part]) for part in self.ranges())

    def arrays(self) -> list[ExportArray]:
        """Return what is written of the rows besides their texts."""
        space, tokens = self.space, int(self.token_offsets[-1])
        kind, vectors = space.rows(self.rows[:0]).dtype, (len(self.rows), space.width)
        found = [
            ExportArray("vectors", kind, vectors, self.each(space.rows)),
            ExportArray.of("keys", torch.from_numpy(self.keys.copy())),
        ]
        if space.spec.get("prompt_state"):
            found.append(
                ExportArray("prompt_vectors", kind, vectors, self.each(lambda rows: space.rows(rows, which="prompt")))
            )
        if self.keeps_tokens:
            states = self.each(lambda rows: space.tokens(rows)[0])
            ids = self.each(lambda rows: space.token_ids(rows)[0].int())
            found += [
                ExportArray("token_values", kind, (tokens, space.width), states),
                ExportArray("token_ids", torch.int32, (tokens,), ids),
                ExportArray.of("token_offsets", torch.from_numpy(self.token_offsets)),
            ]
        return found


def plain(values: torch.Tensor) -> npt.NDArray[Any]:
    """Return values as numpy has them; bfloat16 becomes float32, which holds every value of it."""
    array: npt.NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.ascontiguousarray(array)


def text_arrays(job: ExportJob) -> Iterator[ExportArray]:
    """Yield texts as bytes and where each begins; a missing one is empty."""
    for name in job.texts:
        blocks = [pc.fill_null(pc.binary_length(job.text_block(name, part)), 0).to_numpy() for part in job.ranges()]
        counts = np.concatenate([*blocks, np.empty(0, np.int64)])
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        read = functools.partial(_text_blocks, job, name)
        yield ExportArray(f"{name}_bytes", torch.uint8, (int(offsets[-1]),), read)
        yield ExportArray.of(f"{name}_offsets", offsets)


def _text_blocks(job: ExportJob, name: str) -> Iterator[torch.Tensor]:
    for part in job.ranges():
        content = "".join(text or "" for text in job.text_block(name, part).to_pylist()).encode()
        yield torch.from_numpy(np.frombuffer(content, np.uint8).copy())
