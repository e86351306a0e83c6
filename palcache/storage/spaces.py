"""All vectors of one encoder in one role, found by content and read without a copy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.configs import StoredDtype
from palcache.errors import CacheError, StorageError
from palcache.fingerprints import KEY_BYTES, Keys
from palcache.storage.datasets import POOLED, PROMPT, SCALES, TOKENS
from palcache.storage.gathers import MappedRows
from palcache.storage.indexes import KeyIndex
from palcache.storage.shards import FAILED, Shard

TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}
"""In which type stored vectors are handed out: their own; int8 as byte times scale, in float32."""
Which = Literal["pooled", "prompt"]
"""Of a joint space: the vector of the whole item, or the state at the end of its prompt (causal models)."""
_DATASETS: Final[Mapping[Which, str]] = {"pooled": POOLED, "prompt": PROMPT}


@final
class Space:
    """All vectors of one encoder spec in one role, row by row over its sealed shards.

    A row's number is its position in the shards in order of their names. It holds for the shards that were there when the
    space was opened: a slower writer's shard may come to stand before others.

    Args:
        folder: `CACHE/spaces/<space_id>`.
        space_id: digest of the spec.
        spec: everything that changes the meaning of a vector.
    """

    def __init__(self, folder: Path, space_id: str, spec: Mapping[str, Any]) -> None:
        self.folder, self.space_id, self.spec = folder, space_id, spec
        self.shards = _open_shards(self.shard_folder)
        for shard in self.shards:
            if shard.header.space_id != space_id:
                fields = differing_fields(shard.header.spec, spec)
                raise CacheError(
                    f"{shard.path} belongs to the space {shard.header.space_id}, not to {space_id}: their encoder specs "
                    f"differ in {', '.join(fields) or 'nothing else'}; move the file back, or delete it and embed again."
                )
        self._bases = np.cumsum([0, *(shard.header.rows for shard in self.shards)])
        self._tensors: dict[str, list[torch.Tensor]] = {}
        self._rows: dict[str, MappedRows] = {}

    @property
    def shard_folder(self) -> Path:
        """Where the shards are."""
        return self.folder / "shards"

    @property
    def role(self) -> str:
        """`prompt`, `response`, `joint` or `image`."""
        return str(self.spec["role"])

    @property
    def dtype(self) -> StoredDtype:
        """Type of the stored vectors."""
        dtype: StoredDtype = self.spec["dtype"]
        return dtype

    @property
    def width(self) -> int:
        """Number of values in a vector, d."""
        return int(self.spec["width"])

    def __len__(self) -> int:
        return int(self._bases[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the shards on disk."""
        return sum(shard.path.stat().st_size for shard in self.shards)

    @functools.cached_property
    def index(self) -> KeyIndex:
        """From keys to rows; read from `index.h5`, or built where that is missing or older than the shards."""
        return KeyIndex.load(self.folder / "index.h5", self._stamp()) or self._build_index()

    def _stamp(self) -> list[str]:
        return [shard.path.name for shard in self.shards]

    def _build_index(self) -> KeyIndex:
        usable = [(shard.flags & FAILED) == 0 for shard in self.shards]
        keys = [shard.keys[good] for shard, good in zip(self.shards, usable, strict=True)]
        rows = np.flatnonzero(np.concatenate([*usable, np.empty(0, bool)]))
        index = KeyIndex.build(np.concatenate([*keys, np.empty((0, KEY_BYTES), np.uint8)]))
        return KeyIndex(index.high, index.low, rows[index.positions])

    def save_index(self) -> None:
        """Write `index.h5` unless it is up to date, so that the next reader need not sort the keys."""
        if KeyIndex.load(self.folder / "index.h5", self._stamp()) is None:
            self._build_index().save(self.folder / "index.h5", self._stamp())

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Return the row of each key, (n,), and -1 where the space does not have it."""
        return self.index.find(keys)

    def rows(
        self, indices: npt.NDArray[Any] | torch.Tensor, *, which: Which = "pooled", device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """Return the vectors of some rows, (n, d), read through the memory map.

        They have the stored dtype; int8 is returned as byte times scale in float32.

        Args:
            indices: row numbers, (n,).
            which: `prompt` is the state at the end of a joint item's prompt.
            device: where to.

        Raises:
            IndexError: a row is outside the space.
            CacheError: the space has no such vectors.
        """
        return self._gather(_DATASETS[which], self._checked(indices), self._bases).to(device)

    def read_ahead(self, indices: npt.NDArray[Any] | torch.Tensor, *, which: Which = "pooled") -> None:
        """Let the system read the vectors of some rows, (n,), from the disk while nobody waits for them yet.

        Raises:
            IndexError: a row is outside the space.
        """
        if self.shards:
            self._mapped(_DATASETS[which], self._bases).read_ahead(self._checked(indices))

    def tensor(self, *, which: Which = "pooled", device: str | torch.device = "cpu") -> torch.Tensor:
        """Return all vectors, (N, d), as `rows` does; on the CPU a single shard is not copied, unless it is int8."""
        if not self.shards:
            return torch.empty((0, self.width), dtype=TORCH_DTYPES[self.dtype], device=device)
        parts = self._parts(_DATASETS[which])
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.dtype == "int8":
            whole = whole.float() * torch.cat(self._parts(SCALES[_DATASETS[which]]))[:, None]
        return whole.to(device)

    def tokens(
        self,
        indices: npt.NDArray[Any] | torch.Tensor,
        *,
        first: torch.Tensor | None = None,
        stop: torch.Tensor | None = None,
        ahead: bool = False,
        device: str | torch.device = "cpu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept token states of some rows, row after row: (T, d) values and (n + 1,) int64 offsets.

        Values have the type that `rows` gives. Neighbouring rows of one shard in ascending order are not copied on the
        CPU, unless they are int8.

        Args:
            indices: row numbers, (n,).
            first: of each row the first token wanted, (n,) int64; None for the first of all.
            stop: of each row the token after the last wanted, (n,) int64; None for all.
            ahead: let the system read what is asked for in one go, for rows far apart on a disk.
            device: where to.

        Raises:
            IndexError: a row is outside the space.
            CacheError: the space keeps no token states.
        """
        places, offsets = self._token_places(self._checked(indices), first, stop)
        if ahead and self.shards:
            self._mapped(TOKENS, self._token_bases).read_ahead(places)
        return self._gather(TOKENS, places, self._token_bases).to(device), offsets.to(device)

    def token_ids(self, indices: npt.NDArray[Any] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids of the kept tokens of some rows, row after row: (T,) int64 ids and (n + 1,) int64 offsets.

        Raises:
            IndexError: a row is outside the space.
            CacheError: the space keeps no token states.
        """
        places, offsets = self._token_places(self._checked(indices))
        return self._gather("tok/ids", places, self._token_bases).long(), offsets

    def token_lengths(self, indices: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[np.int64]:
        """Return how many tokens of some rows are kept, (n,).

        Raises:
            IndexError: a row is outside the space.
            CacheError: the space keeps no token states.
        """
        at = self._checked(indices)
        lengths: npt.NDArray[np.int64] = (self._token_starts[at + 1] - self._token_starts[at]).numpy()
        return lengths

    def prompt_lengths(self, indices: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[np.int64]:
        """Return how many tokens of some joint rows are the prompt's, (n,).

        Raises:
            IndexError: a row is outside the space.
            CacheError: the rows are no joint items.
        """
        at = self._checked(indices)
        lengths: npt.NDArray[np.int64] = self._gather("n_prompt", at, self._bases).numpy().astype(np.int64)
        return lengths

    @property
    def token_count(self) -> int:
        """Number of kept token states."""
        return int(self._token_bases[-1])

    def _checked(self, indices: npt.NDArray[Any] | torch.Tensor) -> torch.Tensor:
        at = torch.as_tensor(indices, dtype=torch.int64, device="cpu").reshape(-1)
        lowest, highest = torch.aminmax(at) if at.numel() else (0, -1)
        if int(lowest) < 0 or int(highest) >= len(self):
            wrong = at[(at < 0) | (at >= len(self))][0]
            raise IndexError(f"Got the row {int(wrong)}; the space {self.space_id} has rows 0 to {len(self) - 1}.")
        return at

    @functools.cached_property
    def _token_starts(self) -> torch.Tensor:
        """Where the kept tokens of each row begin when all shards' tokens are counted through, (N + 1,)."""
        if "tokens" not in self.spec:
            raise CacheError(
                f"The space {self.space_id} in {self.folder.parent.parent} keeps no token states; embed with --tokens "
                "responses or --tokens all."
            )
        parts = [torch.from_numpy(shard.dataset("tok/offsets")) for shard in self.shards]
        bases = np.cumsum([0, *(int(part[-1]) for part in parts)])
        starts = [part[:-1] + int(base) for part, base in zip(parts, bases[:-1], strict=True)]
        return torch.cat([*starts, torch.tensor([int(bases[-1])])])

    @functools.cached_property
    def _token_bases(self) -> npt.NDArray[np.int64]:
        bases: npt.NDArray[np.int64] = self._token_starts.numpy()[self._bases]
        return bases

    def _token_places(
        self, at: torch.Tensor, first: torch.Tensor | None = None, stop: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept tokens of some rows, counted through all shards, and where each row's begin among them."""
        starts = self._token_starts[at] if first is None else self._token_starts[at] + first
        lengths = (self._token_starts[at + 1] if stop is None else self._token_starts[at] + stop) - starts
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(lengths, 0)])
        return torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], lengths), offsets

    def _parts(self, name: str) -> list[torch.Tensor]:
        """Return a dataset of every shard as tensors over the memory maps."""
        if name not in self._tensors:
            self._tensors[name] = [_as_tensor(shard.dataset(name), self.dtype) for shard in self.shards]
        return self._tensors[name]

    def _gather(self, name: str, at: torch.Tensor, bases: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return some entries of a dataset, counted through the shards that begin at `bases`."""
        if not self.shards:
            empty = torch.empty((0, self.width), dtype=TORCH_DTYPES[self.dtype])
            return empty if name in SCALES else torch.empty(0, dtype=torch.int64)
        rows = self._mapped(name, bases)
        found = rows.neighbours(at) if name == TOKENS else None
        found = rows.take(at) if found is None else found
        if self.dtype == "int8" and name in SCALES:
            return found.float() * self._mapped(SCALES[name], bases).take(at)[:, None]
        return found

    def _mapped(self, name: str, bases: npt.NDArray[np.int64]) -> MappedRows:
        if name not in self._rows:
            self._rows[name] = MappedRows(self._parts(name), bases)
        return self._rows[name]

    def norms(self) -> npt.NDArray[np.float32]:
        """Return the Euclidean norms of all vectors before they were stored, (N,)."""
        return np.concatenate([*(shard.norms for shard in self.shards), np.empty(0, np.float32)])


def differing_fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields in which two encoder specs differ, sorted."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _open_shards(folder: Path) -> list[Shard]:
    """Open the sealed shards of a folder; looks again where the cache was compacted between the listing and the opening."""
    while True:
        paths = sorted(folder.glob("*.h5"))
        try:
            return [Shard(path) for path in paths]
        except StorageError:
            if all(path.exists() for path in paths):
                raise


def _as_tensor(array: npt.NDArray[Any], dtype: StoredDtype) -> torch.Tensor:
    """Return an array as a tensor over the same memory; ids, which torch can hardly count, as their bits in int32."""
    if array.dtype == np.uint16 and dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)
