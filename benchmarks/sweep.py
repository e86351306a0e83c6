"""sweep: many heads at once, in stacks side by side, against the same heads one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, final

import numpy as np
import torch

from benchmarks.measuring import Job, clock, devices, finish, in_turn, ratio
from benchmarks.results import Row, row
from benchmarks.sources import data_file, embedded, scratch, small_planted
from palcache import (
    Cache,
    EmbedConfig,
    FitConfig,
    HeadConfig,
    PreferenceData,
    build_head,
    fit,
    load_preferences,
    train_run,
)
from palcache.devices import keep_freed_memory, side_by_side
from palcache.fits import Course, FitResult, multiply_adds
from palcache.stacks import Member
from palcache.sweeps.grids import configs_of, parse_grid
from palcache.sweeps.plans import fit_members, plan_stacks
from palcache.sweeps.sweeps import run_sweep
from palcache.tensors import TensorTable

TABLE: Final = "convarg/seen_users.parquet"
RATES: Final = (2e-3, 1e-3, 5e-4, 3e-4)
TOLERANCE: Final = 1e-4
SAME: Final = {"cpu": 1.0, "cuda": 0.9}
"""Share of heads that must agree over the whole run."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Heads, seeds times learning rates, and what they are trained on.

    Attributes:
        name: of the heads, for people.
        members: the heads.
        train: training comparisons.
        val: a few comparisons.
        alone: so many heads are trained one after the other; their time stands for all.
    """

    name: str
    members: Sequence[Member]
    train: PreferenceData
    val: PreferenceData
    alone: int

    @classmethod
    def of(cls, data: PreferenceData, config: HeadConfig, batch: int, heads: int, alone: int) -> Task:
        """Take heads of a configuration, one epoch each on data that is cut to whole batches."""
        shape = build_head(config, d=data.width, users=len(data.users))
        options = {"batch_size": batch, "epochs": 1, "evaluations": 2, "patience": 0}
        members = [
            Member(shape, FitConfig(lr=lr, seed=seed, **options))  # type: ignore[arg-type]
            for lr in RATES
            for seed in range(heads // len(RATES))
        ]
        name = f"{heads} heads, k = {config.k}, d = {data.width}, p = {config.p}, batch {batch}"
        rows = np.arange(len(data) // batch * batch)
        return cls(name, members, data.take(rows), data.take(rows[:256]), alone)

    def at_once(self) -> list[FitResult]:
        """Train all heads in stacks, on a CPU one stack per thread."""
        device = self.train.device
        jobs = torch.get_num_threads() if device.type == "cpu" else 1
        stacks = plan_stacks(self.members, self.train, jobs=jobs)

        def work(numbers: list[int]) -> list[FitResult]:
            return _good(fit_members([self.members[i] for i in numbers], self.train, self.val))

        results = chain.from_iterable(side_by_side(work, stacks, device))
        found = dict(zip(chain.from_iterable(stacks), results, strict=True))
        finish(device.type)
        return [found[i] for i in range(len(self.members))]

    def one_by_one(self) -> list[FitResult]:
        """Train the first heads one after the other."""
        found = [fit(m.shape, self.train, self.val, m.config) for m in self.members[: self.alone]]
        finish(self.train.device.type)
        return found

    def differences(self) -> list[float]:
        """Return the largest difference of a loss between each head in a stack and alone, sorted."""
        out = []
        for mine, theirs in zip(self.at_once(), self.one_by_one(), strict=False):
            pairs = [
                (getattr(one, name), getattr(other, name))
                for one, other in zip(mine.history, theirs.history, strict=True)
                for name in ("train_loss", "val_loss")
            ]
            out.append(max(abs(a - b) for a, b in pairs))
        return sorted(out)


def _good(found: Sequence[object]) -> list[FitResult]:
    return [result for result in found if isinstance(result, FitResult)]


def run(quick: bool) -> list[Row]:
    """Measure the CPU, and CUDA where it is there, and whole runs."""
    keep_freed_memory()
    return [_gpu(quick) if device == "cuda" else _cpu(quick) for device in devices()] + [_whole(quick)]


def _cpu(quick: bool) -> Row:
    what = "heads/s, 32 heads (8 seeds x 4 learning rates), p = 64, batch 32, convarg"
    unmeasured = row("sweep", what, "cpu", against="the same heads one after the other", goal="4")
    if quick:
        stored = small_planted(scratch() / "small-planted")
        return _measure(unmeasured, Task.of(load_preferences(*stored, device="cpu"), HeadConfig(p=8), 32, 8, 8), 2)
    if data_file(TABLE) is None:
        return unmeasured.skipped(f"there is no {TABLE} (set PALCACHE_DATA_DIR)")
    cache = Cache(embedded(TABLE, EmbedConfig(device="cpu")))
    data = load_preferences(cache, cache.comparisons(), device="cpu")
    return _measure(unmeasured, Task.of(data.take(np.arange(6_400)), HeadConfig(p=64), 32, 32, 32), 5)


def _gpu(quick: bool) -> Row:
    heads, n = (16, 2_048) if quick else (256, 25_600)
    unmeasured = row(
        "sweep",
        f"heads/s, {heads} heads, d = 1,024, p = 512, batch 256, random vectors",
        "cuda",
        against=f"{heads // 16} of them one after the other, times 16",
        goal="20",
    )
    g = torch.Generator().manual_seed(0)
    prompts, responses = (TensorTable(torch.randn(rows, 1_024, generator=g).cuda()) for rows in (2_000, 20_000))
    at = [torch.randint(rows, (n,), generator=g).cuda() for rows in (2_000, 20_000, 20_000, 500)]
    y = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0).cuda()
    data = PreferenceData(prompts, responses, at[0], at[1], at[2], at[3], y, tuple(map(str, range(500))))
    return _measure(unmeasured, Task.of(data, HeadConfig(p=512), 256, heads, heads // 16), 2 if quick else 5)


def _measure(unmeasured: Row, task: Task, rounds: int) -> Row:
    differences = task.differences()
    exact = sum(difference == 0 for difference in differences)
    same = sum(difference <= TOLERANCE for difference in differences)
    jobs: dict[str, Job] = {"at once": lambda: clock(task.at_once), "alone": lambda: clock(task.one_by_one)}
    seconds = in_turn(jobs, rounds, warm=False)
    share = len(task.members) / task.alone
    seconds["alone"] = [value * share for value in seconds["alone"]]
    gain = ratio(seconds["alone"], seconds["at once"])
    step = {name: sorted(values)[len(values) // 2] / len(task.members) for name, values in seconds.items()}
    measured = (
        f"{step['at once'] * 1e3:,.0f} ms a head against {step['alone'] * 1e3:,.0f} ms; losses of {len(differences)} heads: "
        f"{exact} the same to the last bit, {same} within {TOLERANCE:.0e}, the largest difference {differences[-1]:.0e}"
    )
    note = (
        f"{task.name}; one epoch of {len(task.train):,} comparisons, training alone; {_share(task, seconds['at once'])}"
    )
    if same < SAME[task.train.device.type] * len(differences):
        return unmeasured.with_verdict(False, f"losses differ: {measured}", str(gain), note)
    return unmeasured.with_ratio(gain, float(unmeasured.goal), measured, note)


def _share(task: Task, seconds: Sequence[float]) -> str:
    """Return the share of the rate of bare batched products that training at once reaches."""
    heads, config = len(task.members), task.members[0].config
    steps = Course.of(config, len(task.train)).steps
    shape = task.members[0].shape
    parameters = shape.initial(torch.Generator())
    flops = 6 * multiply_adds(parameters, config.batch_size)  # forward, and twice backward; repeated rows counted again
    rate = flops * steps * heads / statistics.median(seconds)
    x, w = (
        torch.randn(heads, rows, task.train.width, device=task.train.device) for rows in (2 * config.batch_size, 64)
    )

    def multiply() -> None:
        torch.bmm(x, w.transpose(1, 2))
        finish(task.train.device.type)

    multiply()
    bare = 2 * x.numel() * w.shape[1] / statistics.median(clock(multiply) for _ in range(9))
    return f"{rate / 1e9:,.0f} GFLOP/s as if no row were repeated, bare batched products of that many rows {bare / 1e9:,.0f}"


def _whole(quick: bool) -> Row:
    """Compare `run_sweep` with `train_run` on each of its heads: run folders and wall times, everything included."""
    grid = "seed=0:2 lr=1e-3 k=2 epochs=1" if quick else "seed=0:4 lr=1e-3,3e-4 k=2"
    what = f"whole runs by sweep, convarg, grid '{grid}'"
    unmeasured = row("sweep", what, "cpu", against="train-head for each, one after the other", goal="equal folders")
    if not quick and data_file(TABLE) is None:
        return unmeasured.skipped(f"there is no {TABLE} (set PALCACHE_DATA_DIR)")
    if quick:
        cache, _ = small_planted(scratch() / "small-planted")
    else:
        cache = Cache(embedded(TABLE, EmbedConfig(device="cpu")))
    folder = scratch() / "whole-runs"
    start = time.perf_counter()
    heads = run_sweep(cache, folder / "sweep", parse_grid(grid), device="cpu").heads
    at_once, start = time.perf_counter() - start, time.perf_counter()
    for number, head in enumerate(heads):
        shape, fitted, _ = configs_of(head.params)
        train_run(cache, folder / str(number), head=shape, config=fitted, device="cpu")
    alone = time.perf_counter() - start
    same = sum(_contents(head.path) == _contents(folder / str(number)) for number, head in enumerate(heads))
    measured = f"{at_once:.1f} s against {alone:.1f} s; {same} of {len(heads)} run folders the same byte for byte"
    return unmeasured.with_verdict(
        True, measured, f"{alone / at_once:.2f}", "one round; yardsticks and evaluation included"
    )


def _contents(run: Path) -> dict[str, bytes]:
    """Return a run folder's files by name; a sweep draws no pictures."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.suffix != ".png"}
