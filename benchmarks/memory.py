"""memory: train on a cache twice as large as the memory that the process may take, against training in memory."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import pyarrow as pa

from benchmarks.limits import Limit, NoLimitError, forget_pages, memory_limit
from benchmarks.measuring import Machine, Ratio, ratio
from benchmarks.results import Row, row
from benchmarks.sources import add_table, add_vectors, numbered, random_vectors, scratch, spec_of
from palcache import Cache, Comparisons, FitConfig, HeadConfig, PalB, fit, load_preferences
from palcache.comparisons import Column
from palcache.fingerprints import text_keys
from palcache.training import FitProgress

LIMIT: Final = 640 * 2**20
WIDTH: Final = 384
USERS: Final = 100
GOAL: Final = 1.5
SECONDS: Final = 150
"""Training that takes longer than this in all is stopped and reported as it is."""
_ROOT: Final = Path(__file__).parents[1]


class EndedError(Exception):
    """A training process ended before its time."""


@final
@dataclass(slots=True)
class Trainer:
    """A process that trains one epoch, a segment at a time when it is told to.

    Attributes:
        process: `python -m benchmarks.memory CACHE`.
        millis: ms of a step in each segment so far.
        facts: what it said when it had loaded the data, and at the end.
    """

    process: subprocess.Popen[str]
    millis: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Wait until the data is loaded."""
        self.facts |= self._hear()

    def segment(self) -> bool:
        """Train a segment; return False when there is none left."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        heard = self._hear()
        if "millis" not in heard:
            self.facts |= heard
            return False
        self.millis.append(float(heard["millis"]))
        return True

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            why = "was killed for memory" if code in {-9, 137} else f"ended with {code}"
            raise EndedError(f"{why} {'while loading' if not self.facts else f'after {len(self.millis)} segments'}")
        heard: dict[str, Any] = json.loads(line)
        return heard


@contextlib.contextmanager
def trainer(cache: Path, segments: int, limit: Limit | None = None) -> Iterator[Trainer]:
    """Start a training process, within a limit where one is given, and stop it in the end."""
    command = [*(limit.command if limit else ()), sys.executable, "-m", "benchmarks.memory", str(cache), str(segments)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=_ROOT
    )
    try:
        yield Trainer(process)
    finally:
        process.kill()
        process.communicate()


def run(quick: bool) -> list[Row]:
    """Train in both ways in turn, segment by segment, on a cache on the disk."""
    limit = 448 * 2**20 if quick else LIMIT
    vectors = 8 * 2**20 if quick else 2 * LIMIT
    what = (
        f"one epoch, default head, d = {WIDTH}, vectors of {vectors / 2**20:,.0f} MiB, limit {limit / 2**20:,.0f} MiB"
    )
    goal = f"finishes, at most {GOAL} times as long a step"
    unmeasured = row("memory", what, "cpu", against="a process without a limit, vectors in memory", goal=goal)
    if sys.platform != "linux" or Machine.here().memory < 12 * vectors:
        return [unmeasured.skipped("needs Linux and memory for the vectors in float32")]
    cache = _write_cache(scratch() / "large", vectors)
    shutil.copytree(cache, scratch() / "large-copy")  # of its own, so that its pages are not there for the other
    try:
        with memory_limit(limit) as set_limit:
            return [_measure(unmeasured, cache, set_limit, segments=3 if quick else 20)]
    except NoLimitError as error:
        return [unmeasured.skipped(str(error))]
    finally:
        shutil.rmtree(cache)
        shutil.rmtree(scratch() / "large-copy")


def _write_cache(folder: Path, vector_bytes: int) -> Path:
    """Write a table whose every comparison has a prompt and two responses of its own."""
    n = vector_bytes // (3 * 2 * WIDTH)
    cache, vectors = Cache.create(folder), random_vectors(1 << 15, WIDTH, seed=9)
    prompts, responses = numbered("prompt ", n), numbered("response ", 2 * n)
    order = np.arange(n, dtype=np.int32)
    spaces = (
        add_vectors(cache, spec_of("prompt", WIDTH), text_keys(prompts), vectors),
        add_vectors(cache, spec_of("response", WIDTH), text_keys(responses), vectors),
    )
    for space in spaces:
        space.save_index()
    y = np.where(np.random.Generator(np.random.PCG64(1)).random(n) < 0.5, -1, 1).astype(np.int8)
    users = Column(pa.array([f"user {i}" for i in range(USERS)], pa.large_string()), order % USERS)
    comparisons = Comparisons(users, Column(prompts, order), responses, order, order + n, y)
    add_table(cache, "large", comparisons, spaces)
    return folder


def _measure(unmeasured: Row, cache: Path, limit: Limit, *, segments: int) -> Row:
    copy = cache.with_name("large-copy")
    forget_pages(cache)
    start = time.perf_counter()
    with trainer(cache, segments, limit) as limited, trainer(copy, segments) as free:
        try:
            limited.load()
            free.load()
            while limited.segment() and free.segment():
                if time.perf_counter() - start > SECONDS:
                    break
        except EndedError as error:
            return unmeasured.with_verdict(False, f"the process {error}", note=_note(limit, limited))
        done = "streamed" in free.facts and "peak" in limited.facts
        note = _note(limit, limited)
    if free.facts["streamed"]:
        return unmeasured.skipped("the machine has not memory enough to train in memory")
    pairs = min(len(limited.millis), len(free.millis))
    each = ratio(limited.millis[:pairs], free.millis[:pairs])
    slower = Ratio(sum(limited.millis[:pairs]) / sum(free.millis[:pairs]), each.low, each.high)
    measured = _figures(limited, free, segments if done else None)
    return unmeasured.with_verdict(done and slower.value <= GOAL, measured, str(slower), note)


def _figures(limited: Trainer, free: Trainer, segments: int | None) -> str:
    ended = "finished" if segments else f"stopped after {SECONDS} s and {len(limited.millis)} segments"
    return (
        f"{ended}; {statistics.mean(limited.millis):.2f} ms a step on average against "
        f"{statistics.mean(free.millis):.2f} ms; "
        f"loading {limited.facts['seconds']:.1f} s against {free.facts['seconds']:.1f} s"
    )


def _note(limit: Limit, limited: Trainer) -> str:
    peak, facts = limit.peak(), limited.facts
    charged = f"; at most {peak / 2**20:,.0f} MiB were charged to it" if peak else ""
    streamed = f"; vectors streamed: {facts['streamed']}" if "streamed" in facts else ""
    disk = (
        f"; {facts['read'] / 2**20:,.0f} MiB read from the disk, {facts['faults']:,} page faults"
        if "read" in facts
        else ""
    )
    return f"limit by {limit.how}, pages of files counted{charged}{streamed}{disk}"


def _train_here(folder: Path, segments: int) -> None:
    """Load the data, then train a segment for every line read; say in JSON how long it took."""
    start = time.perf_counter()
    cache = Cache(folder)
    data = load_preferences(cache, cache.comparisons(), device="cpu")
    _say(seconds=time.perf_counter() - start, streamed=data.streamed)
    config = FitConfig(epochs=1, evaluations=segments, patience=0)
    shape = PalB.from_config(HeadConfig(), d=data.width, users=len(data.users))
    if not sys.stdin.readline():
        return

    def on_progress(progress: FitProgress) -> None:
        _say(millis=config.batch_size / progress.comparisons_per_second * 1e3)
        if not sys.stdin.readline():
            raise SystemExit

    fit(shape, data, data.take(np.arange(0, len(data), max(1, len(data) // 2_000))), config, on_progress=on_progress)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _say(peak=usage.ru_maxrss * 1_024, faults=usage.ru_majflt, read=_read_bytes())


def _read_bytes() -> int:
    """Return the bytes that this process made the disk read."""
    with contextlib.suppress(OSError):
        rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
        return int(rows["read_bytes"])
    return 0


def _say(**facts: float | bool) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    _train_here(Path(sys.argv[1]), int(sys.argv[2]))
