"""A folder of embeddings: spaces of vectors found by content, and the tables of comparisons that use them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy.typing as npt
import torch

from palcache.errors import CacheError, InputError, MismatchError, StorageError
from palcache.files import read_json, storage_errors, sync_folder, write_json
from palcache.fingerprints import digest
from palcache.storage.comparison_files import StoredComparisons, read_stored, write_stored
from palcache.storage.journals import journal_line, read_journal, write_journal
from palcache.storage.locks import locked
from palcache.storage.shards import Shard
from palcache.storage.spaces import Space

__all__ = ["MANIFEST", "Cache", "Space"]

FORMAT: Final = "palcache"
VERSION: Final = 1
MANIFEST: Final = "palcache.json"


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
        if not isinstance(manifest.get("spaces"), dict):
            raise CacheError(f"{path / MANIFEST} is damaged: it names no spaces; embed into a new folder.")
        self._specs: dict[str, dict[str, Any]] = manifest["spaces"]

    @classmethod
    def create(cls, path: Path) -> Cache:
        """Open the cache at `path` for writing, making an empty one where there is none.

        Raises:
            InputError: the folder holds something else.
            StorageError: the folder cannot be written.
        """
        if _is_foreign(path) and not (path / MANIFEST).is_file():
            raise InputError(f"{path} exists and is not a cache; name a new or empty folder with --cache.")
        with locked(path / ".lock"):
            if not (path / MANIFEST).is_file():
                write_json(path / MANIFEST, {"format": FORMAT, "version": VERSION, "spaces": {}})
        cache = cls(path)
        cache.reconcile_journal()
        return cache

    @property
    def space_ids(self) -> list[str]:
        """Ids of the spaces, sorted."""
        return sorted(self._specs)

    def about(self, space_id: str) -> Mapping[str, Any]:
        """Return where a space's encoder came from: names and revisions that are not part of its identity."""
        about: dict[str, Any] = self._specs[space_id]["about"]
        return about

    def spec(self, space_id: str) -> Mapping[str, Any]:
        """Return what identifies a space, as the manifest has it: everything that changes the meaning of a vector."""
        spec: dict[str, Any] = self._specs[space_id]["spec"]
        return spec

    def space(self, space_id: str) -> Space:
        """Open a space.

        Raises:
            MismatchError: the cache has no such space.
            CacheError: a shard is damaged or of another version.
        """
        if space_id not in self._specs:
            raise MismatchError(f"The cache {self.path} has no space {space_id}; it has {', '.join(self.space_ids)}.")
        return Space(self.path / "spaces" / space_id, space_id, self._specs[space_id]["spec"])

    def tokens(
        self, space_id: str, indices: npt.NDArray[Any] | torch.Tensor, *, device: str | torch.device = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept token states of some rows of a space: (T, d) values and (n + 1,) offsets; see `Space.tokens`.

        A space is opened anew by each call; a loop keeps the `Space`.
        """
        return self.space(space_id).tokens(indices, device=device)

    def shard_paths(self, space_id: str) -> list[Path]:
        """Return the sealed shards of a space, in order."""
        return sorted((self.path / "spaces" / space_id / "shards").glob("*.h5"))

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
            for parent in (folder.parent, folder.parent.parent, self.path):
                sync_folder(parent)
        return space_id

    def save_index(self, space_id: str) -> None:
        """Bring `index.h5` of a space up to date with its shards."""
        with locked(self.path / "spaces" / space_id / ".lock"):
            self.space(space_id).save_index()

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

    @staticmethod
    def check_name(name: str) -> None:
        """Refuse a name under which a table cannot be stored.

        Raises:
            InputError: it is no file name.
        """
        if not name or "/" in name or name.startswith("."):
            raise InputError(
                f"Got the table name {name!r}; expected a file name without a slash or a leading dot: choose one with --name."
            )

    def put_comparisons(self, stored: StoredComparisons) -> bool:
        """Write a comparison table, replacing the one of its name; the same table keeps the spaces that it had.

        Returns:
            Whether a table of that name with other comparisons, or another split of them, was replaced.
        """
        self.check_name(stored.name)
        path, differs = self.path / "comparisons" / f"{stored.name}.h5", False
        with locked(path.with_name(".lock")):
            with contextlib.suppress(CacheError):  # a damaged table is replaced
                before = read_stored(path)
                differs = before.fingerprint != stored.fingerprint
                if not differs:
                    stored = replace(
                        stored,
                        spaces=tuple(sorted({*stored.spaces, *before.spaces})),
                        joint_spaces=tuple(sorted({*stored.joint_spaces, *before.joint_spaces})),
                    )
                    if all(getattr(stored, of) == getattr(before, of) for of in ("spaces", "joint_spaces", "about")):
                        return False  # of several processes that embed one table, the first has written it
            write_stored(path, stored)
        return differs

    def remove_comparisons(self, name: str) -> None:
        """Remove a comparison table in one step; its vectors stay until the cache is compacted.

        Raises:
            InputError: there is no table of that name.
            StorageError: the folder cannot be written.
        """
        path = self.path / "comparisons" / f"{name}.h5"
        if name not in self.comparison_names:
            listed = ", ".join(self.comparison_names) or "none"
            raise InputError(f"The cache {self.path} has no comparison table {name} to remove; it has {listed}.")
        with locked(path.with_name(".lock")), storage_errors(path):
            path.unlink(missing_ok=True)
            sync_folder(path.parent)

    def swap_shards(self, space_id: str, added: Mapping[Path, int], removed: Sequence[Path]) -> None:
        """Enter published shards (path -> rows) into the journal and remove others, journal first.

        Killed at any moment, the folder holds every row of the shards that stay, and the journal names no missing shard.
        """
        gone = {path.name for path in removed} - {path.name for path in added}
        with locked(self.path / ".lock"):
            journal = self._journal().items()
            rows = {entry: count for entry, count in journal if not (entry[0] == space_id and entry[1] in gone)}
            rows |= {(space_id, path.name): count for path, count in added.items()}
            write_journal(self.path / "journal.jsonl", rows)
            for path in removed:
                if path.name in gone:
                    path.unlink(missing_ok=True)
            sync_folder(self.path / "spaces" / space_id / "shards")

    def drop_spaces(self, space_ids: Collection[str]) -> None:
        """Remove spaces with their vectors, and folders of spaces that the manifest does not name; manifest first."""
        with locked(self.path / ".lock"):
            manifest = read_json(self.path / MANIFEST, "a palcache cache")
            specs = manifest["spaces"]
            manifest["spaces"] = {space_id: specs[space_id] for space_id in specs if space_id not in space_ids}
            if len(manifest["spaces"]) != len(specs):
                write_json(self.path / MANIFEST, manifest)
            self._specs = manifest["spaces"]
            write_journal(
                self.path / "journal.jsonl",
                {entry: rows for entry, rows in self._journal().items() if entry[0] in self._specs},
            )
            for folder in (self.path / "spaces").glob("*"):
                if folder.name not in self._specs:
                    shutil.rmtree(folder)

    def set_spec(self, space_id: str, spec: Mapping[str, Any]) -> None:
        """Put the spec that a space was named for back into a damaged manifest.

        Raises:
            MismatchError: it is another space's.
        """
        if digest(spec) != space_id:
            raise MismatchError(f"Got the spec of the space {digest(spec)}; expected that of {space_id}.")
        with locked(self.path / ".lock"):
            manifest = read_json(self.path / MANIFEST, "a palcache cache")
            manifest["spaces"][space_id]["spec"] = dict(spec)
            write_json(self.path / MANIFEST, manifest)
            self._specs = manifest["spaces"]

    def record(self, space_id: str, shard: Path, rows: int) -> None:
        """Append a sealed shard to the journal, durably, unless it stands there."""
        journal = self.path / "journal.jsonl"
        with locked(self.path / ".lock"), storage_errors(journal):
            if (space_id, shard.name) in self._journal():
                return
            with journal.open("ab") as file:
                file.write(journal_line(space_id, shard.name, rows))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.path)

    def _journal(self) -> dict[tuple[str, str], int]:
        return read_journal(self.path / "journal.jsonl")

    def reconcile_journal(self) -> None:
        """Make the journal say what the folders hold, byte for byte; the folders win."""
        with locked(self.path / ".lock"):
            on_disk = {
                (space_id, shard.name): shard for space_id in self.space_ids for shard in self.shard_paths(space_id)
            }
            rows = {entry: count for entry, count in self._journal().items() if entry in on_disk}
            for entry, shard in on_disk.items():
                if entry not in rows:
                    with contextlib.suppress(CacheError, StorageError):  # damaged: verify says so
                        rows[entry] = Shard(shard).header.rows
            write_journal(self.path / "journal.jsonl", rows)

    def journal_rows(self, space_id: str) -> dict[str, int]:
        """Return the journal's shards of a space: name -> rows."""
        return {name: rows for (named, name), rows in self._journal().items() if named == space_id}

    def missing_shards(self) -> list[tuple[str, str]]:
        """Return (space id, shard name) of the journal's shards that the folders do not have."""
        return [
            (space_id, name)
            for space_id, name in self._journal()
            if not (self.path / "spaces" / space_id / "shards" / name).is_file()
        ]


def _is_foreign(path: Path) -> bool:
    """Return whether there is anything at `path` but what a writer leaves that was killed while it made a cache."""
    if not path.is_dir():
        return path.exists() and not path.is_dir()  # it may be made this moment, by another writer
    return any(entry.name != ".lock" and not entry.match(f".{MANIFEST}.*.tmp") for entry in path.iterdir())
