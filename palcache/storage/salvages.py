"""What can be trusted in a damaged shard, whatever bit of it is wrong.

The layout of a shard follows from its header and, where token states are kept, their number, so the rows are found without
HDF5's own bytes: a blank shard is laid out beside the damaged one, and the damaged bytes are read at its offsets. Then every
block is held against its sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import numpy as np
import numpy.typing as npt
import xxhash

from palcache.errors import CacheError, StorageError
from palcache.fingerprints import KEY_BYTES, Keys
from palcache.storage.datasets import (
    BLOCK_ROWS,
    COSINE,
    POOLED,
    TOKENS,
    Array,
    ShardHeader,
    TokenRows,
    data_nbytes,
    sum_name,
    summed_in,
)
from palcache.storage.indexes import KeyIndex
from palcache.storage.layouts import create_shard, dataset_places, map_datasets, open_shard
from palcache.storage.shards import RAGGED, block_sums, shard_digest

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
        cosines_proved: the sampled cosines are those that were written; else they, or their sum, are damaged.
    """

    path: Path
    header: ShardHeader
    arrays: Mapping[str, Array]
    sound: npt.NDArray[np.bool_]
    keyed: npt.NDArray[np.bool_]
    cosines_proved: bool = True

    @property
    def trusted(self) -> Mapping[str, Array]:
        """The row datasets; cosines that are not proved are unknown (NaN), as no vector depends on them."""
        if self.cosines_proved:
            return self.arrays
        return {**self.arrays, COSINE: np.full_like(self.arrays[COSINE], np.nan)}

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
        for tokens in _token_counts(path, header):
            yield header, _read_blind(path, header, tokens)
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


def _token_counts(path: Path, header: ShardHeader) -> Iterator[int | None]:
    """Yield how many token states a shard of this header may keep: as HDF5 says, and as its rows' token counts say.

    The latter stand in the file before the first dataset whose place depends on the number.
    """
    if "tokens" not in header.spec:
        yield None
        return
    found = []
    with contextlib.suppress(CacheError, StorageError):
        found.append(len(open_shard(path, shared=False)[1]["tok/ids"]))
    found.append(int(_counted_offsets(_read_blind(path, header, 0), header)[-1]))
    for tokens in dict.fromkeys(found):
        if data_nbytes(header, tokens) <= path.stat().st_size:
            yield tokens


def _counted_offsets(arrays: Mapping[str, Array], header: ShardHeader) -> npt.NDArray[np.int64]:
    """Return where each row's kept tokens begin by the rows' token counts, (N + 1,)."""
    counts = arrays["n_tokens"].astype(np.int64)
    if header.spec["tokens"] == "responses" and "n_prompt" in arrays:
        counts -= np.minimum(arrays["n_prompt"], arrays["n_tokens"])
    return np.concatenate([[0], np.cumsum(counts)])


def _read_blind(path: Path, header: ShardHeader, tokens: int | None) -> dict[str, Array]:
    """Return the row datasets and sums at the places where a shard of this header has them; zeros beyond its end."""
    n = header.rows
    blank = path.with_name(f".{path.stem[:6]}.blank.tmp")
    kept = None if tokens is None else TokenRows(np.full(n + 1, tokens, np.int64), np.zeros(tokens, np.uint32))
    keys, none = np.zeros((n, KEY_BYTES), np.uint8), np.zeros(n, np.uint32)
    joint = none if header.spec.get("role") == "joint" else None
    try:
        create_shard(blank, header, keys, none, none.astype(np.uint8), prompt_tokens=joint, tokens=kept)
        places = dataset_places(blank)
        size = blank.stat().st_size
    finally:
        blank.unlink(missing_ok=True)
    if path.stat().st_size >= size:
        return map_datasets(path, places, shared=False)
    content = path.read_bytes().ljust(size, b"\0")
    return {
        name: np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)
        for name, (offset, dtype, shape) in places.items()
    }


def _check(path: Path, header: ShardHeader, arrays: Mapping[str, Array], known: Keys) -> Salvage | None:
    """Hold every block against its sum; None where the arrays do not fit one another."""
    names = [name for name in summed_in(arrays) if name != COSINE]
    if not _fit_together(arrays, names):
        return None
    n, arrays = len(arrays["key"]), dict(arrays)
    good = {name: block_sums(arrays[name]) == arrays[sum_name(name)] for name in names}
    proved = COSINE not in arrays
    if not proved:
        arrays[COSINE], proved = _mend_cosines(arrays[COSINE], arrays[sum_name(COSINE)])
    arrays["key"], good["key"] = _mend_keys(arrays["key"], good["key"], arrays[sum_name("key")], known)
    block_of = np.arange(n) // BLOCK_ROWS
    keyed = good["key"][block_of]
    ragged = [name for name in (*RAGGED, "tok/offsets") if name in good]
    sound = np.logical_and.reduce([good[name][block_of] for name in names if name not in ragged])
    if TOKENS in arrays:
        offsets = _mend_offsets(arrays, header, good["tok/offsets"])
        if offsets is None:
            return None
        arrays["tok/offsets"] = offsets
        sound &= _sound_tokens(offsets, [good[name] for name in ragged if name != "tok/offsets"])
        sound &= _sound_offsets(offsets, arrays[sum_name("tok/offsets")])
    kept = {name: arrays[name] for name in summed_in(arrays)}
    return Salvage(path, replace(header, rows=n), kept, sound, keyed, proved)


def _fit_together(arrays: Mapping[str, Array], names: Sequence[str]) -> bool:
    """Return whether datasets are as long as one another, and each has a sum per block."""
    n, tokens = len(arrays["key"]), len(arrays.get("tok/ids", ()))
    rows = {name: tokens if name in RAGGED else n + (name == "tok/offsets") for name in names}
    return all(
        len(arrays[name]) == count and arrays[sum_name(name)].shape == (-(-count // BLOCK_ROWS),)
        for name, count in rows.items()
    )


def _mend_cosines(cosines: Array, sums: Array) -> tuple[Array, bool]:
    """Return cosines, one bit turned back where their sum then proves them, and whether it does.

    No model is needed to find one bit among the few that they have.
    """
    if np.array_equal(block_sums(cosines), sums):
        return cosines, True
    trial = np.ascontiguousarray(cosines).copy()
    content = trial.view(np.uint8)
    for at in range(8 * len(content)):
        content[at // 8] ^= 1 << at % 8
        if xxhash.xxh3_64_intdigest(content.data) == int(sums[0]):
            return trial, True
        content[at // 8] ^= 1 << at % 8
    return cosines, False


def _mend_offsets(arrays: Mapping[str, Array], header: ShardHeader, good: Array) -> npt.NDArray[np.int64] | None:
    """Return where each row's kept tokens begin: as stored, or where those are damaged as the rows' token counts say.

    None where neither can be: they do not rise from 0 to the number of tokens.
    """
    stored: npt.NDArray[np.int64] = arrays["tok/offsets"]
    counted = _counted_offsets(arrays, header)
    for offsets in (stored, counted) if good.all() else (counted, stored):
        if offsets[0] == 0 and offsets[-1] == len(arrays["tok/ids"]) and bool((np.diff(offsets) >= 0).all()):
            return offsets
    return None


def _sound_offsets(offsets: npt.NDArray[np.int64], sums: Array) -> npt.NDArray[np.bool_]:
    """Return which rows lie between offsets that are as they were written, (N,)."""
    each = (block_sums(offsets) == sums)[np.arange(len(offsets)) // BLOCK_ROWS]
    both: npt.NDArray[np.bool_] = each[:-1] & each[1:]
    return both


def _sound_tokens(offsets: npt.NDArray[np.int64], good: Sequence[Array]) -> npt.NDArray[np.bool_]:
    """Return which rows have only kept tokens in blocks that are as they were written, (N,)."""
    tokens = int(offsets[-1])
    bad = ~np.logical_and.reduce([blocks[np.arange(tokens) // BLOCK_ROWS] for blocks in good])
    before = np.concatenate([[0], np.cumsum(bad)])
    sound: npt.NDArray[np.bool_] = before[offsets[1:]] == before[offsets[:-1]]
    return sound


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
