"""read: random batches of vectors to torch, against `np.memmap` on a `.npy` file of the same vectors."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measuring import Job, clock, devices, finish, in_turn, ratio
from benchmarks.results import Row, row
from benchmarks.sources import SHARD_ROWS, add_vectors, numbered_keys, random_vectors, scratch, spec_of
from palcache import Cache, Space
from palcache.storage.datasets import POOLED
from palcache.storage.gathers import MappedRows

GOAL: Final = 1.2
BATCH: Final = 256
Reader = Callable[[npt.NDArray[np.int64]], object]


def run(quick: bool) -> list[Row]:
    """Measure a space of shards of the default size, and one of a single shard, on every device."""
    rows, width, batches, rounds = (3_000, 32, 20, 3) if quick else (400_000, 768, 400, 15)
    vectors = random_vectors(rows, width, seed=5)
    file = scratch() / "vectors.npy"
    np.save(file, vectors)
    keys = numbered_keys("row ", rows)
    shard_rows = rows // 3 if quick else SHARD_ROWS
    spaces = [_space(scratch() / f"read-{size}", keys, vectors, shard_rows=size) for size in (shard_rows, rows)]
    return [_measure(space, file, device, batches, rounds) for device in devices() for space in spaces]


def _space(folder: Path, keys: npt.NDArray[np.uint8], vectors: npt.NDArray[Any], *, shard_rows: int) -> Space:
    return add_vectors(
        Cache.create(folder), spec_of("response", vectors.shape[1]), keys, vectors, shard_rows=shard_rows
    )


def _measure(space: Space, file: Path, device: str, batches: int, rounds: int) -> Row:
    memmap = np.load(file, mmap_mode="r")
    readers: dict[str, Reader] = {
        "ours": lambda at: space.rows(at, device=device),
        "theirs": lambda at: torch.from_numpy(memmap[at]).to(device),
    }
    for start in range(0, len(space), 1 << 16):  # both files wholly in the page cache
        block = np.arange(start, min(start + (1 << 16), len(space)))
        for read in readers.values():
            read(block)
    jobs = {name: _job(read, len(space), device, batches) for name, read in readers.items()}
    seconds = in_turn(jobs, rounds)
    drawn = np.random.Generator(np.random.PCG64(12)).integers(len(space), size=(200, BATCH))
    micro = {name: statistics.median(values) / batches * 1e6 for name, values in seconds.items()}
    shards = f"{len(space.shards)} shard{'s' if len(space.shards) > 1 else ''}"
    what = f"batches of {BATCH} random rows of {len(space):,} x {space.width} float16, {shards}, to torch"
    unmeasured = row("read", what, device, against="np.memmap on .npy", goal=str(GOAL))
    measured = f"{micro['ours']:.0f} against {micro['theirs']:.0f} microseconds a batch, files in the page cache"
    return unmeasured.with_ratio(ratio(seconds["theirs"], seconds["ours"]), GOAL, measured, _profile(space, drawn))


def _profile(space: Space, drawn: npt.NDArray[np.int64]) -> str:
    """Return what one batch costs, part by part."""
    maps = [torch.from_numpy(shard.dataset(POOLED)) for shard in space.shards]
    rows, inside = MappedRows(maps, np.cumsum([0, *map(len, maps)])), torch.from_numpy(drawn) % len(maps[0])
    places = [rows.places(torch.from_numpy(at)) for at in drawn]

    def each(action: Callable[[torch.Tensor], object], items: Iterable[torch.Tensor]) -> None:
        for item in items:
            action(item)

    numbers = [torch.from_numpy(at) for at in drawn]
    parts: dict[str, Callable[[], None]] = {
        "find their places": functools.partial(each, rows.places, numbers),
        "gather them": functools.partial(each, rows.at_places, places),
        "gather as many of the first shard": functools.partial(
            each, lambda at: torch.index_select(maps[0], 0, at), inside
        ),
    }
    timed = {name: min(clock(part) for _ in range(5)) / len(drawn) * 1e6 for name, part in parts.items()}
    return "microseconds of a batch, each part timed alone: " + ", ".join(f"{n} {v:.0f}" for n, v in timed.items())


def _job(read: Reader, rows: int, device: str, batches: int) -> Job:
    """Return a job that reads batches of random rows; each reader draws the same ones."""
    random = np.random.Generator(np.random.PCG64(11))

    def job() -> float:
        drawn = random.integers(rows, size=(batches, BATCH))
        return clock(functools.partial(_read_all, read, drawn, device))

    return job


def _read_all(read: Reader, drawn: npt.NDArray[np.int64], device: str) -> None:
    for at in drawn:
        read(at)
    finish(device)
