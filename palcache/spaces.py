"""All vectors of one encoder in one role, found by content and read without a copy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.configs import StoredDtype
from palcache.errors import CacheError, StorageError
from palcache.fingerprints import KEY_BYTES, Keys
from palcache.indexes import KeyIndex
from palcache.shards import FAILED, Shard

TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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

    def index_is_sound(self) -> bool:
        """Return whether the keys lead where the shards say; `index.h5` has no sums of its own."""
        built = self._build_index()
        pairs = ((built.high, self.index.high), (built.low, self.index.low), (built.positions, self.index.positions))
        return all(np.array_equal(theirs, ours) for theirs, ours in pairs)

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Return the row of each key, (n,), and -1 where the space does not have it."""
        return self.index.find(keys)

    @functools.cached_property
    def _tensors(self) -> list[torch.Tensor]:
        return [_as_tensor(shard.vectors, self.dtype) for shard in self.shards]

    def rows(self, indices: npt.NDArray[Any] | torch.Tensor, *, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return the vectors of some rows, (n, d) in the stored dtype, read through the memory map.

        Raises:
            IndexError: a row is outside the space.
        """
        at = torch.as_tensor(indices, dtype=torch.int64, device="cpu").reshape(-1)
        if at.numel() and not (int(at.min()) >= 0 and int(at.max()) < len(self)):
            wrong = at[(at < 0) | (at >= len(self))][0]
            raise IndexError(f"Got the row {int(wrong)}; the space {self.space_id} has rows 0 to {len(self) - 1}.")
        if len(self._tensors) == 1:
            return torch.index_select(self._tensors[0], 0, at).to(device)
        ordered, order = torch.sort(at)
        cuts = torch.searchsorted(ordered, torch.from_numpy(self._bases)).tolist()
        sorted_rows = torch.empty((at.numel(), self.width), dtype=TORCH_DTYPES[self.dtype])
        for shard, (first, last) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            if first < last:
                local = ordered[first:last] - int(self._bases[shard])
                torch.index_select(self._tensors[shard], 0, local, out=sorted_rows[first:last])
        return torch.empty_like(sorted_rows).index_copy_(0, order, sorted_rows).to(device)

    def tensor(self, *, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return all vectors, (N, d) in the stored dtype; on the CPU a single shard is not copied."""
        if not self._tensors:
            return torch.empty((0, self.width), dtype=TORCH_DTYPES[self.dtype], device=device)
        return (self._tensors[0] if len(self._tensors) == 1 else torch.cat(self._tensors)).to(device)

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


def _as_tensor(vectors: npt.NDArray[Any], dtype: StoredDtype) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(vectors.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(vectors)
