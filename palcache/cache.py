"""A folder of embeddings: spaces of vectors found by content, and the tables of comparisons that use them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.claims import Claim, locked, next_sequence, survey
from palcache.comparison_files import StoredComparisons, read_stored, write_stored
from palcache.configs import StoredDtype
from palcache.errors import CacheError, InputError, MismatchError
from palcache.files import read_json, storage_errors, sync_folder, write_bytes, write_json
from palcache.fingerprints import Keys, canonical_json, digest
from palcache.indexes import KeyIndex
from palcache.shards import FAILED, Shard

FORMAT: Final = "palcache"
VERSION: Final = 1
MANIFEST: Final = "palcache.json"
TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@final
class Space:
    """All vectors of one encoder spec in one role, row by row over its sealed shards.

    A row's number is its position in the shards in order of their sequence; it stays the same as shards are added.

    Args:
        folder: `CACHE/spaces/<space_id>`.
        space_id: digest of the spec.
        spec: everything that changes the meaning of a vector.
    """

    def __init__(self, folder: Path, space_id: str, spec: Mapping[str, Any]) -> None:
        self.folder, self.space_id, self.spec = folder, space_id, spec
        self.shards = [Shard(path) for path in sorted(self.shard_folder.glob("*.h5"))]
        for shard in self.shards:
            if shard.header.space_id != space_id:
                raise CacheError(f"{shard.path} belongs to the space {shard.header.space_id}, not to {space_id}.")
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
        index = KeyIndex.build(np.concatenate([*keys, np.empty((0, 16), np.uint8)]))
        return KeyIndex(index.high, index.low, rows[index.positions])

    def save_index(self) -> None:
        """Write `index.h5`, so that the next reader need not sort the keys."""
        self._build_index().save(self.folder / "index.h5", self._stamp())

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
        at = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(self._tensors) == 1:
            return torch.index_select(self._tensors[0], 0, at).to(device)
        if at.numel() and not (int(at.min()) >= 0 and int(at.max()) < len(self)):
            raise IndexError(f"A row outside 0..{len(self) - 1} was asked of the space {self.space_id}.")
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

    def claims(self) -> list[Claim]:
        """Return the shards that were begun by writers now dead (for information; nothing stays locked)."""
        if not self.shard_folder.is_dir() or not os.access(self.shard_folder, os.W_OK):
            return []
        stale = list(survey(self.shard_folder).stale)
        for claim in stale:
            claim.release()
        return stale


def _as_tensor(vectors: npt.NDArray[Any], dtype: StoredDtype) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(vectors.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(vectors)


@final
class Cache:
    """A cache folder opened for reading; `create` and the methods that say so write.

    Args:
        path: the folder.

    Raises:
        InputError: there is no cache at `path`.
        CacheError: it is of another format version, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / MANIFEST).is_file():
            raise InputError(
                f"There is no cache at {path} (no {MANIFEST}); make one with palcache embed TABLE --cache {path}."
            )
        manifest = read_json(path / MANIFEST, "a palcache cache")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CacheError(f"{path / MANIFEST} is not the manifest of a palcache cache.")
        if manifest.get("version") != VERSION:
            raise CacheError(
                f"The cache {path} has format version {manifest.get('version')}; this palcache reads version {VERSION}: "
                "install a palcache that reads it, or embed into a new folder."
            )
        self._specs: dict[str, dict[str, Any]] = manifest["spaces"]

    @classmethod
    def create(cls, path: Path) -> Cache:
        """Open the cache at `path`, making an empty one where there is none.

        Raises:
            InputError: the folder holds something else.
        """
        if not (path / MANIFEST).is_file():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(f"{path} exists and is not a cache; name a new or empty folder with --cache.")
            with storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            write_json(path / MANIFEST, {"format": FORMAT, "version": VERSION, "spaces": {}})
        cache = cls(path)
        cache._reconcile_journal()
        return cache

    @property
    def space_ids(self) -> list[str]:
        """Ids of the spaces, sorted."""
        return sorted(self._specs)

    def about(self, space_id: str) -> Mapping[str, Any]:
        """Return where a space's encoder came from: names and revisions that are not part of its identity."""
        about: dict[str, Any] = self._specs[space_id]["about"]
        return about

    def space(self, space_id: str) -> Space:
        """Open a space.

        Raises:
            MismatchError: the cache has no such space.
            CacheError: a shard is damaged or of another version.
        """
        if space_id not in self._specs:
            raise MismatchError(f"The cache {self.path} has no space {space_id}; it has {', '.join(self.space_ids)}.")
        return Space(self.path / "spaces" / space_id, space_id, self._specs[space_id]["spec"])

    def add_space(self, spec: Mapping[str, Any], about: Mapping[str, Any]) -> str:
        """Register an encoder spec and return its space id; a spec that is already there is left as it is."""
        space_id = digest(spec)
        with locked(self.path / ".lock"):
            manifest = read_json(self.path / MANIFEST, "a palcache cache")
            if space_id not in manifest["spaces"]:
                manifest["spaces"][space_id] = {"spec": dict(spec), "about": dict(about)}
                write_json(self.path / MANIFEST, manifest)
            self._specs = manifest["spaces"]
        folder = self.path / "spaces" / space_id / "shards"
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return space_id

    @property
    def comparison_names(self) -> list[str]:
        """Names of the comparison tables, sorted."""
        return sorted(path.stem for path in (self.path / "comparisons").glob("*.h5"))

    def comparisons(self, name: str | None = None) -> StoredComparisons:
        """Read a comparison table; a cache with only one needs no name.

        Raises:
            InputError: there is no table of that name, or several and no name was given.
        """
        names = self.comparison_names
        listed = ", ".join(names) or "none"
        if name is None and len(names) != 1:
            raise InputError(
                f"The cache {self.path} has {len(names)} comparison tables ({listed}); choose one with --comparisons."
            )
        name = names[0] if name is None else name
        if name not in names:
            raise InputError(f"The cache {self.path} has no comparison table {name}; it has {listed}.")
        return read_stored(self.path / "comparisons" / f"{name}.h5")

    def put_comparisons(self, stored: StoredComparisons) -> None:
        """Write a comparison table, replacing the one of its name."""
        if not stored.name or "/" in stored.name or stored.name.startswith("."):
            raise InputError(
                f"Got the table name {stored.name!r}; expected a file name without a slash or a leading dot."
            )
        write_stored(self.path / "comparisons" / f"{stored.name}.h5", stored)

    def record(self, space_id: str, shard: Path, rows: int) -> None:
        """Append a sealed shard to the journal, durably."""
        line = canonical_json({"rows": rows, "shard": shard.name, "space": space_id}) + b"\n"
        journal = self.path / "journal.jsonl"
        with locked(self.path / ".lock"), storage_errors(journal):
            with journal.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.path)

    def journal(self) -> list[tuple[str, str]]:
        """Return (space id, shard name) of every line of the journal; a line cut short by a crash is left out."""
        path = self.path / "journal.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        entries = []
        for line in lines:
            try:
                entry = json.loads(line)
                entries.append((entry["space"], entry["shard"]))
            except (ValueError, KeyError, TypeError):
                continue
        return entries

    def _reconcile_journal(self) -> None:
        """Make the journal say what the folders hold; the folders win."""
        with locked(self.path / ".lock"):
            on_disk = {
                (space_id, path.name): path
                for space_id in self.space_ids
                for path in sorted((self.path / "spaces" / space_id / "shards").glob("*.h5"))
            }
            entries = self.journal()
            if len(entries) == len(on_disk) and set(entries) == on_disk.keys():
                return
            kept = [entry for entry in dict.fromkeys(entries) if entry in on_disk]
            kept += [entry for entry in on_disk if entry not in set(entries)]
            lines = [
                canonical_json({"rows": Shard(on_disk[entry]).header.rows, "shard": entry[1], "space": entry[0]})
                for entry in kept
            ]
            write_bytes(self.path / "journal.jsonl", b"".join(line + b"\n" for line in lines))

    def missing_shards(self) -> list[tuple[str, str]]:
        """Return (space id, shard name) of the journal's shards that the folders do not have."""
        return [
            (space_id, name)
            for space_id, name in self.journal()
            if not (self.path / "spaces" / space_id / "shards" / name).is_file()
        ]


def claim_sequence(space: Space) -> int:
    """Return the number for a new shard of a space. Call under the space's lock."""
    return next_sequence(space.shard_folder)


def spaces_of(stored: StoredComparisons, choose: str | None, cache: Cache) -> tuple[str, str]:
    """Return the ids of the prompt and response spaces in which a table is embedded.

    Args:
        stored: the table.
        choose: where it is embedded by several encoders, a prefix of the prompt space's id or the model's name.
        cache: the cache that holds it.

    Raises:
        InputError: nothing or more than one thing fits.
    """
    pairs: Sequence[tuple[str, str]] = stored.spaces
    if choose is not None:
        pairs = [pair for pair in pairs if pair[0].startswith(choose) or cache.about(pair[0]).get("model") == choose]
    if len(pairs) != 1:
        have = "; ".join(f"{cache.about(pair[0]).get('model')} = {pair[0][:8]}" for pair in stored.spaces)
        raise InputError(
            f"The table {stored.name} is embedded by {len(stored.spaces)} encoders ({have}) and "
            f"{'--space ' + choose if choose else 'no --space'} fits {len(pairs)} of them; choose one with --space."
        )
    return pairs[0]
