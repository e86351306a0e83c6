"""What can be trusted in a damaged shard, whatever bit of it is wrong.

The layout of a shard follows from its header, so the rows are found without HDF5's own bytes: a blank shard is laid out
beside the damaged one, and the damaged bytes are read at its offsets. Then every block is held against its sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import numpy as np
import numpy.typing as npt

from palcache.errors import CacheError, StorageError
from palcache.fingerprints import KEY_BYTES, Keys
from palcache.indexes import KeyIndex
from palcache.layouts import (
    BLOCK_ROWS,
    COSINE,
    POOLED,
    Array,
    ShardHeader,
    create_shard,
    dataset_places,
    open_shard,
    sum_name,
    summed_in,
)
from palcache.shards import block_sums, shard_digest

_FEW: Final = 64
"""Damaged keys of a block for which the nearest known ones are looked for."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Salvage:
    """The rows of a damaged shard.

    Attributes:
        path: the shard.
        header: what it says of itself, or what it must have said.
        arrays: its row datasets by name.
        sound: which rows are as they were written in every dataset, (N,).
        keyed: which rows have a key that can be trusted, (N,).
    """

    path: Path
    header: ShardHeader
    arrays: Mapping[str, Array]
    sound: npt.NDArray[np.bool_]
    keyed: npt.NDArray[np.bool_]

    @property
    def keys(self) -> Keys:
        """The row keys, (N, 16); only those of `keyed` rows can be trusted."""
        return self.arrays["key"]


def salvage_shard(path: Path, headers: Sequence[ShardHeader], known: Keys) -> Salvage | None:
    """Return what can be trusted in a damaged shard, or None where nothing can.

    Args:
        path: the shard.
        headers: what it may have said of itself, most likely first; the one that saves most rows is taken.
        known: keys that the shard may hold, in the order in which a writer would have taken them, (m, 16).

    Raises:
        StorageError: the folder cannot be written.
    """
    best: Salvage | None = None
    for header, arrays in _views(path, headers):
        found = _check(path, header, arrays, known)
        if found is not None and (best is None or found.sound.sum() > best.sound.sum()):
            best = found
        if best is not None and best.sound.all():
            break
    return best


def _views(path: Path, headers: Sequence[ShardHeader]) -> Iterator[tuple[ShardHeader, dict[str, Array]]]:
    """Yield the datasets as each header would lay them out, then as HDF5 finds them."""
    for header in headers:
        yield header, _read_blind(path, header)
    with contextlib.suppress(CacheError, StorageError):
        header, arrays = open_shard(path, shared=False)
        if headers:
            likely = headers[0]
            if arrays[POOLED].shape[1:] != (likely.width,) or arrays["key"].shape[1:] != (KEY_BYTES,):
                return
            header = replace(likely, versions=header.versions)
        yield header, arrays


def read_versions(path: Path) -> dict[str, str] | None:
    """Return the libraries that a shard names, or None where they cannot be read."""
    try:
        return dict(open_shard(path, shared=False)[0].versions)
    except (CacheError, StorageError):
        return None


def _read_blind(path: Path, header: ShardHeader) -> dict[str, Array]:
    """Return the row datasets and sums at the places where a shard of this header has them; zeros beyond its end."""
    n = header.rows
    blank = path.with_name(f".{path.stem[:6]}.blank.tmp")
    try:
        create_shard(
            blank, header, np.zeros((n, KEY_BYTES), np.uint8), np.zeros(n, np.uint32), np.zeros(n, np.uint8)
        )  # fmt: skip
        places = dataset_places(blank)
        size = blank.stat().st_size
    finally:
        blank.unlink(missing_ok=True)
    content = path.read_bytes()[:size].ljust(size, b"\0")
    return {
        name: np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)
        for name, (offset, dtype, shape) in places.items()
    }


def _check(path: Path, header: ShardHeader, arrays: Mapping[str, Array], known: Keys) -> Salvage | None:
    """Hold every block against its sum; None where the arrays do not fit one another."""
    n, blocks = len(arrays["key"]), -(-len(arrays["key"]) // BLOCK_ROWS)
    names = [name for name in summed_in(arrays) if name != COSINE]
    if any(len(arrays[name]) != n or arrays[sum_name(name)].shape != (blocks,) for name in names):
        return None
    arrays = dict(arrays)
    good = {name: block_sums(arrays[name]) == arrays[sum_name(name)] for name in names}
    if COSINE in arrays and not np.array_equal(block_sums(arrays[COSINE]), arrays[sum_name(COSINE)]):
        arrays[COSINE] = np.full_like(arrays[COSINE], np.nan)  # no vector depends on them
    arrays["key"], good["key"] = _mend_keys(arrays["key"], good["key"], arrays[sum_name("key")], known)
    block_of = np.arange(n) // BLOCK_ROWS
    keyed = good["key"][block_of]
    sound = np.logical_and.reduce([good[name][block_of] for name in names])
    return Salvage(path, replace(header, rows=n), {name: arrays[name] for name in summed_in(arrays)}, sound, keyed)


def _mend_keys(
    keys: Keys, good: npt.NDArray[np.bool_], sums: npt.NDArray[np.uint64], known: Keys
) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """Put known keys in the place of damaged ones, where the block's sum then proves that they are the ones."""
    keys, good = keys.copy(), good.copy()
    index = KeyIndex.build(known)
    for block in np.flatnonzero(~good).tolist():
        part = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        wrong = np.flatnonzero(index.find(keys[part]) < 0)
        absent = known[KeyIndex.build(keys).find(known) < 0]
        for found in (
            absent[: len(wrong)],
            _nearest(keys[part][wrong], absent),
        ):  # in a writer's order, or a few bits off
            if len(found) != len(wrong):
                continue
            trial = keys[part].copy()
            trial[wrong] = found
            if int(block_sums(trial)[0]) == int(sums[block]):
                keys[part], good[block] = trial, True
                break
    return keys, good


def _nearest(keys: Keys, among: Keys) -> Keys:
    """Return for each of a few keys the one that differs in the fewest bits; nothing where there are none or many."""
    if not len(among) or len(keys) > _FEW:
        return among[:0]
    return (
        np.stack([among[int(np.bitwise_count(among ^ key).sum(axis=1).argmin())] for key in keys])
        if len(keys)
        else keys
    )


def likely_headers(
    space_id: str, spec: Mapping[str, object], rows: Sequence[int], versions: Iterable[Mapping[str, str]]
) -> list[ShardHeader]:
    """Return what a shard of a space may say of itself, for the row counts and library versions that it may have."""
    distinct = {tuple(sorted(found.items())): dict(found) for found in versions}
    return [
        ShardHeader(space_id, dict(spec), count, int(str(spec["width"])), spec["dtype"], found)  # type: ignore[arg-type]
        for count in dict.fromkeys(rows)
        if count > 0
        for found in distinct.values()
    ]


def is_whole(path: Path) -> bool:
    """Return whether a shard's bytes are those that it was named for."""
    return shard_digest(path) == path.stem.rpartition("-")[2]
