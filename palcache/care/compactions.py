"""Make a cache smaller: vectors that no table names, failed rows and repeats go; what stays is copied byte for byte."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache, Space
from palcache.errors import CacheError, InputError
from palcache.files import write_bytes
from palcache.fingerprints import Keys, canonical_json, hex_key
from palcache.storage.claims import next_sequence, survey
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.copies import copy_rows
from palcache.storage.datasets import TOKEN_SHARD_BYTES
from palcache.storage.indexes import KeyIndex
from palcache.storage.locks import locked, rewriting
from palcache.storage.references import named_spaces, wanted_keys
from palcache.storage.shards import FAILED, Shard

SHARD_ROWS: Final = 32_768
OnRows = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""
_Rows = npt.NDArray[np.int64]


@final
@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did, or with `plan` would do.

    Attributes:
        spaces_dropped: ids of the spaces that no table names.
        rows: rows before.
        rows_dropped: rows that went: named by no table, failed, or standing twice.
        shards: shards before.
        shards_rewritten: shards that were replaced or removed.
        nbytes: bytes of the shards before.
        nbytes_after: bytes of the shards after; None in a plan.
    """

    spaces_dropped: tuple[str, ...]
    rows: int
    rows_dropped: int
    shards: int
    shards_rewritten: int
    nbytes: int
    nbytes_after: int | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class _SpacePlan:
    """The shards of a space to replace, with the rows of each that stay."""

    space: Space
    replaced: Sequence[tuple[Shard, _Rows]]
    dropped: int


def compact_cache(
    cache: Cache,
    *,
    shard_rows: int = SHARD_ROWS,
    drop_unfinished: bool = False,
    plan: bool = False,
    on_rows: OnRows | None = None,
) -> Compaction:
    """Remove every vector that no comparison table names, failed rows, repeats and the spaces of dropped tables.

    New shards are published before old ones go, so a kill at any moment leaves a cache in which every wanted vector is
    found; compacting again finishes the work. Shards of which every row stays are not touched, except that small ones
    are joined.

    Args:
        cache: the cache.
        shard_rows: rows per new shard.
        drop_unfinished: also drop what an interrupted embed has begun.
        plan: change nothing and return what would be done.
        on_rows: called as rows are copied.

    Raises:
        CacheError: another process writes the cache, a table or shard is damaged, or an embed is unfinished.
        InputError: `shard_rows` is below 1.
        StorageError: the disk is full or read-only.
    """
    if shard_rows < 1:
        raise InputError(f"Got shard_rows = {shard_rows}; expected at least 1.")
    if plan:
        return _result(cache, *_plan(cache, shard_rows))
    with rewriting(cache.path):
        _refuse_unfinished(cache, drop=drop_unfinished)
        dropped, plans = _plan(cache, shard_rows)
        before = _result(cache, dropped, plans)
        cache.drop_spaces(dropped)
        total, done = sum(len(rows) for plan_ in plans for _, rows in plan_.replaced), 0
        for plan_ in plans:
            for count in _rewrite(cache, plan_, shard_rows):
                done += count
                if on_rows:
                    on_rows(done, total)
            cache.save_index(plan_.space.space_id)
            _prune_failed(plan_.space, wanted_keys(_tables(cache), plan_.space.space_id))
        after = sum(cache.space(space_id).nbytes for space_id in cache.space_ids)
    return Compaction(
        before.spaces_dropped, before.rows, before.rows_dropped, before.shards, before.shards_rewritten, before.nbytes, after
    )  # fmt: skip


def refuse_writers(cache: Cache) -> list[tuple[str, int]]:
    """Refuse a cache that a living writer has claims in; return (space id, count) of the claims of dead writers.

    Raises:
        CacheError: a living writer holds a claim.
    """
    unfinished = []
    for space_id in cache.space_ids:
        folder = cache.path / "spaces" / space_id / "shards"
        with locked(folder.parent / ".lock"):
            standing = survey(folder)
            for claim in standing.stale:
                claim.release()
        if standing.holders:
            raise CacheError(
                f"{cache.path} is being written by {', '.join(standing.holders)}; wait for it to end, then run the same "
                "command again."
            )
        if standing.stale:
            unfinished.append((space_id, len(standing.stale)))
    return unfinished


def _refuse_unfinished(cache: Cache, *, drop: bool) -> None:
    for space_id, count in refuse_writers(cache):
        if not drop:
            raise CacheError(
                f"The space {space_id} of {cache.path} has {count} unfinished shard(s) of an embed that was stopped; run that "
                "palcache embed again to finish it, or drop its work with --drop-unfinished."
            )
        folder = cache.path / "spaces" / space_id / "shards"
        with locked(folder.parent / ".lock"):
            for claim in survey(folder).stale:
                claim.drop()


def _tables(cache: Cache) -> list[StoredComparisons]:
    return [cache.comparisons(name) for name in cache.comparison_names]


def _plan(cache: Cache, shard_rows: int) -> tuple[tuple[str, ...], list[_SpacePlan]]:
    tables = _tables(cache)
    named = named_spaces(tables)
    dropped = tuple(space_id for space_id in cache.space_ids if space_id not in named)
    kept = [cache.space(space_id) for space_id in cache.space_ids if space_id in named]
    return dropped, [_plan_space(space, wanted_keys(tables, space.space_id), shard_rows) for space in kept]


def _plan_space(space: Space, wanted: Keys, shard_rows: int) -> _SpacePlan:
    """Find the rows that stay: of each wanted key the first that did not fail."""
    index, keep, first = KeyIndex.build(wanted), [], np.zeros(len(wanted), bool)
    for shard in space.shards:
        at = index.find(shard.keys)
        good = (at >= 0) & ((shard.flags & FAILED) == 0)
        rows = np.flatnonzero(good)
        rows = rows[np.sort(np.unique(at[rows], return_index=True)[1])]
        rows = rows[~first[at[rows]]]
        first[at[rows]] = True
        keep.append(rows)
    parts = list(zip(space.shards, keep, strict=True))
    joined = Counter(_made_by(shard) for shard, rows in parts if _is_small(shard, rows, shard_rows))
    replaced = [
        (shard, rows)
        for shard, rows in parts
        if len(rows) < shard.header.rows or (_is_small(shard, rows, shard_rows) and joined[_made_by(shard)] > 1)
    ]
    return _SpacePlan(space, replaced, len(space) - sum(map(len, keep)))


def _is_small(shard: Shard, rows: _Rows, shard_rows: int) -> bool:
    """Return whether what stays of a shard fills less than half of a new one."""
    return len(rows) < shard_rows // 2 and int(shard.token_nbytes(rows).sum()) < TOKEN_SHARD_BYTES // 2


def _made_by(shard: Shard) -> bytes:
    """Return the libraries and device that wrote a shard: rows of others stay apart."""
    return canonical_json(dict(shard.header.versions))


def _rewrite(cache: Cache, plan: _SpacePlan, shard_rows: int) -> Iterator[int]:
    """Write the rows that stay into new shards, then remove the old ones; yield the rows of each new shard."""
    for shard, _ in plan.replaced:
        if damage := shard.damage():
            raise CacheError(
                f"{shard.path} is damaged ({damage[0].dataset}), so its rows are not copied; run palcache cache verify "
                f"{cache.path} --repair first."
            )
    folder = plan.space.shard_folder
    groups: defaultdict[bytes, list[tuple[Shard, _Rows]]] = defaultdict(list)
    for shard, rows in plan.replaced:
        groups[_made_by(shard)].append((shard, rows))
    added: dict[Path, int] = {}
    for group in groups.values():
        for chunk in _chunks(group, shard_rows):
            parts = [(shard.row_data, rows) for shard, rows in chunk]
            path, count = copy_rows(folder, next_sequence(folder), chunk[0][0].header, parts)
            added[path] = count
            yield count
    cache.swap_shards(plan.space.space_id, added, [shard.path for shard, _ in plan.replaced])


def _chunks(group: Sequence[tuple[Shard, _Rows]], size: int) -> Iterator[list[tuple[Shard, _Rows]]]:
    """Yield rows of shards in order, `size` at a time, or fewer where their token states would be too many."""
    chunk: list[tuple[Shard, _Rows]] = []
    room, nbytes = size, TOKEN_SHARD_BYTES
    for shard, taken in group:
        rows, ends = taken, np.cumsum(shard.token_nbytes(taken))
        while len(rows):
            count = min(room, int(np.searchsorted(ends, nbytes, side="right")))
            count = max(count, not chunk)  # a row with more than a shard should hold has one of its own
            if count:
                chunk.append((shard, rows[:count]))
                room, nbytes = room - count, nbytes - int(ends[count - 1])
                rows, ends = rows[count:], ends[count:] - ends[count - 1]
            if len(rows) or not room:
                yield chunk
                chunk, room, nbytes = [], size, TOKEN_SHARD_BYTES
    if chunk:
        yield chunk


def _prune_failed(space: Space, wanted: Keys) -> None:
    """Leave in `failed.jsonl` only texts that a table names."""
    path = space.folder / "failed.jsonl"
    if not path.is_file():
        return
    known = {hex_key(key) for key in wanted}
    lines = path.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if _key_of(line) in known)
    if kept != b"".join(lines):
        write_bytes(path, kept)


def _key_of(line: bytes) -> Any:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("key") if isinstance(entry, Mapping) else None


def _result(cache: Cache, dropped: tuple[str, ...], plans: Sequence[_SpacePlan]) -> Compaction:
    gone = [cache.space(space_id) for space_id in dropped]
    spaces = [*gone, *(plan.space for plan in plans)]
    return Compaction(
        spaces_dropped=dropped,
        rows=sum(map(len, spaces)),
        rows_dropped=sum(map(len, gone)) + sum(plan.dropped for plan in plans),
        shards=sum(len(space.shards) for space in spaces),
        shards_rewritten=sum(len(space.shards) for space in gone) + sum(len(plan.replaced) for plan in plans),
        nbytes=sum(space.nbytes for space in spaces),
    )
