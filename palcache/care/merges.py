"""Bring caches that were built apart into one: rows by key, tables by name and fingerprint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from palcache.cache import Cache
from palcache.care.compactions import refuse_writers
from palcache.errors import CacheError, InputError, MismatchError
from palcache.files import publish, storage_errors
from palcache.fingerprints import KEY_BYTES, digest
from palcache.storage.claims import next_sequence
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.copies import copy_rows
from palcache.storage.indexes import KeyIndex
from palcache.storage.locks import rewriting
from palcache.storage.shards import FAILED, Shard

OnRows = Callable[[int, int], None]
"""Called with the rows looked at and the rows in all."""


@final
@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge did.

    Attributes:
        caches: caches read.
        spaces_added: ids of the spaces that were new.
        rows_added: rows that were new.
        rows_known: rows that the cache already had.
        rows_failed: rows without a vector, left behind.
        tables: names of the tables brought over or found already there.
    """

    caches: int
    spaces_added: tuple[str, ...]
    rows_added: int
    rows_known: int
    rows_failed: int
    tables: tuple[str, ...]


def merge_caches(sources: Sequence[Cache], into: Path, *, on_rows: OnRows | None = None) -> Merge:
    """Add the rows and tables of other caches to the cache at `into`, made where it is missing.

    Spaces of one id are one space: rows whose keys it has are left out. Tables come over under their names once all rows
    are there. A kill at any moment leaves a sound cache, and the same call goes on. The other caches are only read.

    Raises:
        InputError: no cache is given, one is merged into itself, or two different tables have one name.
        CacheError: a shard or table is damaged, or another process writes the cache.
        MismatchError: a manifest's spec is not the one that its space was named for.
        StorageError: the disk is full or read-only.
    """
    if not sources:
        raise InputError("No cache to merge was given; name at least one folder.")
    target = Cache.create(into)
    with rewriting(target.path):
        refuse_writers(target)
        tables = _check(sources, target)
        known = set(target.space_ids)
        total = sum(len(source.space(space_id)) for source in sources for space_id in source.space_ids)
        seen, counts = 0, np.zeros(3, np.int64)
        for source in sources:
            for space_id in source.space_ids:
                for rows, found in _merge_space(source, target, space_id):
                    seen, counts = seen + rows, counts + found
                    if on_rows:
                        on_rows(seen, total)
                target.save_index(space_id)
        for stored in tables:
            target.put_comparisons(stored)
    added, repeated, failed = counts.tolist()
    new = tuple(space_id for space_id in target.space_ids if space_id not in known)
    return Merge(len(sources), new, added, repeated, failed, tuple(sorted({stored.name for stored in tables})))


def _check(sources: Sequence[Cache], target: Cache) -> list[StoredComparisons]:
    """Return the tables of the sources; refuse before anything is copied what cannot be merged."""
    prints = {name: (target.comparisons(name).fingerprint, target.path) for name in target.comparison_names}
    tables = []
    for source in sources:
        if source.path.resolve() == target.path.resolve():
            raise InputError(f"{source.path} would be merged into itself; name another cache.")
        for space_id in source.space_ids:
            if (found := digest(source.space(space_id).spec)) != space_id:
                raise MismatchError(
                    f"The manifest of {source.path} holds the spec of {found} under the name {space_id}; run palcache cache "
                    f"verify {source.path} --repair first."
                )
        for name in source.comparison_names:
            stored = source.comparisons(name)
            fingerprint, place = prints.setdefault(name, (stored.fingerprint, source.path))
            if fingerprint != stored.fingerprint:
                raise InputError(
                    f"The table {name} of {source.path} (fingerprint {stored.fingerprint[:8]}) is not the table {name} of "
                    f"{place} ({fingerprint[:8]}); embed one of them under another --name, and remove the other with "
                    "palcache cache rm."
                )
            tables.append(stored)
    return tables


def _merge_space(source: Cache, target: Cache, space_id: str) -> list[tuple[int, tuple[int, int, int]]]:
    """Copy what a space lacks; return per shard its rows, and how many were new, known and failed."""
    theirs = source.space(space_id)
    target.add_space(theirs.spec, source.about(space_id))
    ours = target.space(space_id)
    index = KeyIndex.build(
        np.concatenate(
            [*(shard.keys[(shard.flags & FAILED) == 0] for shard in ours.shards), np.empty((0, KEY_BYTES), np.uint8)]
        )
    )
    out = []
    position = 0
    for shard in theirs.shards:
        good = (shard.flags & FAILED) == 0
        first = theirs.find(shard.keys) == np.arange(position, position + shard.header.rows)
        position += shard.header.rows
        new = np.flatnonzero(good & first & (index.find(shard.keys) < 0))
        if len(new):
            _copy(shard, new, target, space_id)
        failed = int((~good).sum())
        out.append((shard.header.rows, (len(new), shard.header.rows - len(new) - failed, failed)))
    return out


def _copy(shard: Shard, rows: np.ndarray[tuple[int], np.dtype[np.int64]], target: Cache, space_id: str) -> None:
    if damage := shard.damage():
        raise CacheError(
            f"{shard.path} is damaged ({damage[0].dataset}), so it is not merged; run palcache cache verify --repair on its "
            "cache first."
        )
    folder = target.path / "spaces" / space_id / "shards"
    sequence = next_sequence(folder)
    if len(rows) == shard.header.rows:  # the whole file, digest and all
        path, draft = folder / f"{sequence:06d}-{shard.path.stem[7:]}.h5", folder / f".{sequence:06d}.copy.tmp"
        with storage_errors(path):
            shutil.copyfile(shard.path, draft)
        publish(draft, path)
    else:
        path, _ = copy_rows(folder, sequence, shard.header, [(shard.row_data, rows)])
    target.record(space_id, path, len(rows))
