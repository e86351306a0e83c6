"""train: comparisons per second of PAL-B, against a plain `DataLoader` loop, and its share of the matmul rate."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.matmuls import Products, products_of_step
from benchmarks.measuring import Job, clock, devices, finish, in_turn, ratio
from benchmarks.plain_loops import CachedVectors, PlainPalB, palcache_margins, train_epoch
from benchmarks.results import Row, row
from benchmarks.sources import data_file, embedded, planted_cache, scratch, small_planted
from palcache import Cache, EmbedConfig, FitConfig, HeadConfig, PalB, PreferenceData, fit, load_preferences
from palcache.heads import Parameters
from palcache.losses import cross_entropy
from palcache.noises import Noise
from palcache.storage.comparison_files import StoredComparisons
from palcache.synthetic import draw_population, population_comparisons
from palcache.training import FitProgress

TABLE: Final = "convarg/seen_users.parquet"
Stored = tuple[Cache, StoredComparisons]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Training data and the head to be trained on them.

    Attributes:
        shape: PAL-B with k = 2 and p = d.
        train: comparisons, a multiple of the batch size.
        val: a few comparisons, evaluated outside the time measured.
        batch: comparisons per step.
        device: where.
    """

    shape: PalB
    train: PreferenceData
    val: PreferenceData
    batch: int
    device: str

    @classmethod
    def of(cls, stored: Stored, device: str, batch: int) -> Task:
        """Load a table, cut to whole batches."""
        data = load_preferences(*stored, device=device)
        config = HeadConfig(k=2, p=data.width)
        shape = PalB.from_config(config, d=data.width, users=len(data.users))
        n = len(data) // batch * batch
        return cls(shape, data.take(np.arange(n)), data.take(np.arange(min(n, 256))), batch, device)

    @property
    def name(self) -> str:
        """The head and the batch, for people."""
        return f"PAL-B k = {self.shape.k}, d = p = {self.shape.d}, batch {self.batch:,}, float32"

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.train) // self.batch

    def parameters(self) -> Parameters:
        """Draw parameters that take gradients."""
        drawn = self.shape.initial(torch.Generator().manual_seed(0))
        return {name: value.to(self.device).requires_grad_() for name, value in drawn.items()}

    def ours(self) -> float:
        """Train one epoch as `fit` does; return the seconds of its steps."""
        seen: list[FitProgress] = []
        config = FitConfig(batch_size=self.batch, epochs=1, evaluations=1, patience=0)
        fit(self.shape, self.train, self.val, config, on_progress=seen.append)
        (progress,) = seen
        return progress.steps * self.batch / progress.comparisons_per_second

    def plain(self, loader: DataLoader[Any]) -> float:
        """Train one epoch in a plain loop, the head written in the usual modules."""
        head = PlainPalB(self.shape, self.parameters()).to(self.device)
        return train_epoch(head, head.parameters(), loader, self.device)

    def half_plain(self, loader: DataLoader[Any]) -> float:
        """Train one epoch in a plain loop that calls palcache's head."""
        parameters = self.parameters()
        return train_epoch(
            palcache_margins(self.shape, parameters, self.device), parameters.values(), loader, self.device
        )


def run(quick: bool) -> list[Row]:
    """Measure both tables and the share of the matmul rate, on every device."""
    rounds = 2 if quick else 5
    planted = _planted(quick=quick)
    rows: list[Row] = []
    for device in devices():
        task = Task.of(planted, device, 256)
        distinct = f"planted: {len(task.train.prompts):,} prompts, {len(task.train.responses):,} responses"
        rows.append(_against_loop(task, distinct, 2.0, rounds))
        rows += [] if quick else [_convarg(device, rounds)]
        rows.append(_share(Task.of(planted, device, 256 if quick else 4_096), rounds))
    return rows


def _planted(*, quick: bool) -> Stored:
    if quick:
        return small_planted(scratch() / "small-planted")
    population = draw_population(seed=1, users=80, k=2, d=384, p=64)
    planted = population_comparisons(population, seed=2, prompts=2_000, responses=20_000, per_user=512, temperature=0.1)
    return planted_cache(planted, scratch() / "planted", name="planted")


def _convarg(device: str, rounds: int) -> Row:
    if data_file(TABLE) is None:
        return _loop_row("comparisons/s, convarg", 5.0, device).skipped(f"there is no {TABLE} (set PALCACHE_DATA_DIR)")
    cache = Cache(embedded(TABLE, EmbedConfig(device=device)))
    task = Task.of((cache, cache.comparisons()), device, 256)
    distinct = f"convarg: {len(task.train.prompts)} prompts, {len(task.train.responses)} responses"
    return _against_loop(task, distinct, 5.0, rounds)


def _loop_row(what: str, goal: float, device: str) -> Row:
    return row("train", what, device, against="a plain DataLoader loop, same head and optimizer", goal=str(goal))


def _against_loop(task: Task, distinct: str, goal: float, rounds: int) -> Row:
    loader = DataLoader(CachedVectors(task.train), batch_size=task.batch, shuffle=True)
    jobs: dict[str, Job] = {
        "ours": task.ours,
        "theirs": functools.partial(task.plain, loader),
        "half": functools.partial(task.half_plain, loader),
    }
    seconds = in_turn(jobs, rounds)
    rate = {name: len(task.train) / statistics.median(values) for name, values in seconds.items()}
    measured = (
        f"{rate['ours']:,.0f}/s ({task.batch / rate['ours'] * 1e3:.1f} ms a step) against {rate['theirs']:,.0f}/s "
        f"({task.batch / rate['theirs'] * 1e3:.1f} ms), epochs of {len(task.train):,}; the loop with palcache's head in it "
        f"{rate['half']:,.0f}/s, ratio {ratio(seconds['half'], seconds['ours'])}"
    )
    gain = ratio(seconds["theirs"], seconds["ours"])
    unmeasured = _loop_row(f"comparisons/s, {task.name}, {distinct}", goal, task.device)
    bare = _median(_products(task).run, task.device) * 1e3
    allowed = task.batch / rate["theirs"] * 1e3 / goal
    note = f"{profile(task)}; the goal allows {allowed:.1f} ms a step, of which bare matmuls take {bare:.1f}"
    return unmeasured.with_ratio(gain, goal, measured, note)


def _products(task: Task) -> Products:
    drawn = task.train.batch(torch.randperm(len(task.train))[: task.batch].to(task.device))
    return products_of_step(task.shape, drawn)


def _share(task: Task, rounds: int) -> Row:
    products = _products(task)

    def multiply() -> None:
        for _ in range(task.steps):
            products.run()
        finish(task.device)

    seconds = in_turn({"ours": task.ours, "bare": functools.partial(clock, multiply)}, rounds)
    step = {name: statistics.median(values) / task.steps for name, values in seconds.items()}
    what = f"share of the matmul rate, {task.name}, planted"
    unmeasured = row("train", what, task.device, against="bare torch.matmul of the same shapes", goal="0.7")
    measured = (
        f"{step['ours'] * 1e3:.1f} ms a step ({products.flops / step['ours'] / 1e9:,.0f} GFLOP/s in products) against "
        f"{step['bare'] * 1e3:.1f} ms ({products.flops / step['bare'] / 1e9:,.0f} GFLOP/s)"
    )
    return unmeasured.with_ratio(ratio(seconds["bare"], seconds["ours"]), 0.7, measured, profile(task))


def profile(task: Task) -> str:
    """Return what a batch holds and how long the parts of a step take, each timed alone."""
    some = torch.randperm(len(task.train))[: task.batch].to(task.device)
    drawn, parameters = task.train.batch(some), task.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    noise = Noise.of(0, device=task.device)

    def loss() -> torch.Tensor:
        return cross_entropy(task.shape.margins(parameters, drawn, noise=noise), drawn.y).mean()

    def backward() -> None:
        loss().backward()  # type: ignore[no-untyped-call]

    parts: dict[str, Callable[[], object]] = {
        "gather the batch": lambda: task.train.batch(some),
        "forward": loss,
        "forward and backward": backward,
        "optimizer": optimizer.step,
        "bare matmuls": products_of_step(task.shape, drawn).run,
    }
    millis = ", ".join(f"{name} {_median(part, task.device) * 1e3:.2f}" for name, part in parts.items())
    return (
        f"{len(drawn.responses):,} responses and {len(drawn.prompts):,} prompts are projected in a batch; ms of a step, each "
        f"part timed alone: {millis}"
    )


def _median(action: Callable[[], object], device: str, times: int = 9) -> float:
    def once() -> None:
        action()
        finish(device)

    once()
    return statistics.median(clock(once) for _ in range(times))
