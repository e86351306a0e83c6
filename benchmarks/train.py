"""train: comparisons per second of PAL-B, against a plain `DataLoader` loop, and its share of the matmul rate."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measuring import Job, clock, devices, finish, in_turn, ratio
from benchmarks.results import Row, row
from benchmarks.sources import data_file, embedded, planted_cache, scratch
from palcache import Cache, EmbedConfig, FitConfig, HeadConfig, PalB, PreferenceData, fit, load_preferences
from palcache.comparison_files import StoredComparisons
from palcache.losses import cross_entropy
from palcache.synthetic import draw_population, population_comparisons
from palcache.tensors import PairBatch
from palcache.training import FitProgress

TABLE: Final = "convarg/seen_users.parquet"
Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Training data and the head to be trained on them.

    Attributes:
        shape: PAL-B with k = 2 and p = d.
        train: comparisons, a multiple of the batch size.
        val: a few comparisons, evaluated outside the time measured.
    """

    shape: PalB
    train: PreferenceData
    val: PreferenceData

    @classmethod
    def of(cls, cache: Cache, stored: StoredComparisons, device: str, batch: int) -> Task:
        """Load a table, cut to whole batches."""
        data = load_preferences(cache, stored, device=device)
        config = HeadConfig(k=2, p=data.width)
        shape = PalB.from_config(config, d=data.width, users=len(data.users))
        n = len(data) // batch * batch
        return cls(shape, data.take(np.arange(n)), data.take(np.arange(min(n, 256))))

    def seconds(self, batch: int, epochs: int) -> float:
        """Train as `fit` does; return the seconds of its steps."""
        seen: list[FitProgress] = []
        config = FitConfig(batch_size=batch, epochs=epochs, evaluations=1, patience=0)
        fit(self.shape, self.train, self.val, config, on_progress=seen.append)
        (progress,) = seen
        return progress.steps * batch / progress.comparisons_per_second


class CachedVectors(Dataset[Sample]):
    """What one would write first: vectors in memory, one comparison at a time.

    Args:
        data: comparisons with resident vectors; this set is on the CPU.
    """

    def __init__(self, data: PreferenceData) -> None:
        self.prompts = _vectors(data.prompts)
        self.responses = _vectors(data.responses)
        self.rows = torch.stack([data.prompt, data.response_1, data.response_2, data.user], dim=1).tolist()
        self.y = data.y.cpu()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        prompt, left, right, user = self.rows[index]
        return self.prompts[prompt], self.responses[left], self.responses[right], user, self.y[index]


def _vectors(table: Any) -> torch.Tensor:
    vectors: torch.Tensor = table.take(torch.arange(len(table), device=table.device)).cpu()
    return vectors


def plain_epoch(task: Task, loader: DataLoader[Sample], device: str) -> float:
    """Train one epoch in a plain loop with the same head, loss and optimizer; return the seconds of its steps."""
    parameters = task.shape.initial(torch.Generator().manual_seed(0))
    parameters = {name: value.to(device).requires_grad_() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.01)
    noise = torch.Generator(device)

    def epoch() -> None:
        for prompts, left, right, user, y in loader:
            batch = _batch(*(value.to(device) for value in (prompts, left, right, user, y)))
            loss = cross_entropy(task.shape.margins(parameters, batch, noise=noise), batch.y).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        finish(device)

    return clock(epoch)


def _batch(
    prompts: torch.Tensor, left: torch.Tensor, right: torch.Tensor, user: torch.Tensor, y: torch.Tensor
) -> PairBatch:
    rows = torch.arange(len(y), device=y.device)
    return PairBatch(prompts, rows, torch.cat([left, right]), rows, rows + len(y), user, y)


def run(quick: bool) -> list[Row]:
    """Measure both tables and the share of the matmul rate, on every device."""
    planted = _planted(quick=quick)
    rows: list[Row] = []
    for device in devices():
        rows.append(_against_loop(planted, "planted, 20,000 responses", 2.0, device, quick=quick))
        rows.append(_convarg(device, quick=quick))
        rows.append(_share(planted, device, quick=quick))
    return rows


def _planted(*, quick: bool) -> tuple[Cache, StoredComparisons]:
    users, d, prompts, responses = (4, 32, 40, 300) if quick else (80, 384, 2_000, 20_000)
    population = draw_population(seed=1, users=users, k=2, d=d, p=min(d, 64))
    planted = population_comparisons(
        population, seed=2, prompts=prompts, responses=responses, per_user=512, temperature=0.1
    )
    return planted_cache(planted, scratch() / "planted", name="planted")


def _loop_row(table: str, goal: float, device: str) -> Row:
    what = f"comparisons/s, PAL-B k = 2, d = p = 384, batch 256, float32, {table}"
    return row("train", what, device, against="a plain DataLoader loop, same head and optimizer", goal=str(goal))


def _convarg(device: str, *, quick: bool) -> Row:
    table, goal = "convarg: 16 prompts, 509 responses", 5.0
    if quick or data_file(TABLE) is None:
        why = "--quick embeds no table" if quick else f"there is no {TABLE} (set PALCACHE_DATA_DIR)"
        return _loop_row(table, goal, device).skipped(why)
    cache = Cache(embedded(TABLE, EmbedConfig(device=device)))
    return _against_loop((cache, cache.comparisons()), table, goal, device, quick=quick)


def _against_loop(stored: tuple[Cache, StoredComparisons], table: str, goal: float, device: str, *, quick: bool) -> Row:
    batch, rounds = 256, 2 if quick else 5
    task = Task.of(*stored, device, batch)
    loader = DataLoader(CachedVectors(task.train), batch_size=batch, shuffle=True)
    jobs: dict[str, Job] = {
        "ours": functools.partial(task.seconds, batch, 1),
        "theirs": functools.partial(plain_epoch, task, loader, device),
    }
    seconds = in_turn(jobs, rounds)
    n = len(task.train)
    rate = {name: n / statistics.median(values) for name, values in seconds.items()}
    step = {name: batch / value * 1e3 for name, value in rate.items()}
    measured = (
        f"{rate['ours']:,.0f}/s ({step['ours']:.1f} ms a step) against {rate['theirs']:,.0f}/s ({step['theirs']:.1f} ms), "
        f"epochs of {n:,} comparisons"
    )
    gain = ratio(seconds["theirs"], seconds["ours"])
    return _loop_row(table, goal, device).with_ratio(gain, goal, measured, _profile(task, batch, device))


def _profile(task: Task, batch: int, device: str) -> str:
    """Return where the time of a step goes, each part timed alone."""
    some = torch.randperm(len(task.train))[:batch].to(device)
    drawn = task.train.batch(some)
    parameters = task.shape.initial(torch.Generator().manual_seed(0))
    parameters = {name: value.to(device).requires_grad_() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    noise = torch.Generator(device)

    def loss() -> torch.Tensor:
        return cross_entropy(task.shape.margins(parameters, drawn, noise=noise), drawn.y).mean()

    def backward() -> None:
        loss().backward()  # type: ignore[no-untyped-call]

    products = _products(task.shape, drawn, device)
    parts = {"batch": lambda: task.train.batch(some), "forward": loss, "forward and backward": backward}
    parts |= {"optimizer": optimizer.step, "bare matmuls of the step": products.run}
    millis = {name: _millis(part, device) for name, part in parts.items()}
    shapes = f"{len(drawn.responses)} distinct responses and {len(drawn.prompts)} distinct prompts in a batch"
    return f"{shapes}; ms each, alone: " + ", ".join(f"{name} {value:.2f}" for name, value in millis.items())


def _millis(action: Any, device: str, times: int = 11) -> float:
    def once() -> None:
        action()
        finish(device)

    once()
    return statistics.median(clock(once) for _ in range(times)) * 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """The matrix products of one training step, with nothing between them.

    Attributes:
        pairs: factors of each product, (.., m, i) and (.., i, n).
        outs: room for each result.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    outs: list[torch.Tensor]

    def run(self) -> None:
        """Multiply."""
        for (left, right), out in zip(self.pairs, self.outs, strict=True):
            torch.matmul(left, right, out=out)

    @property
    def flops(self) -> float:
        """Floating-point operations of all products."""
        return float(sum(2 * left.numel() * right.shape[-1] for left, right in self.pairs))


def _products(shape: PalB, batch: PairBatch, device: str) -> Products:
    """Return the products of a step of PAL-B with `mlp2` projectors: three linear layers, forward and backward."""
    pairs = [
        *_layers((), len(batch.responses), (shape.d, shape.p), device),
        *_layers((shape.k,), len(batch.prompts), (shape.d, shape.p), device),
    ]
    outs = [torch.matmul(left, right) for left, right in pairs]
    return Products(pairs, outs)


def _layers(
    copies: tuple[int, ...], rows: int, widths: tuple[int, int], device: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the factors of three layers; the copies' first layers share their input, so they are one product."""
    d, p = widths
    first = p * (copies[0] if copies else 1)
    x, hidden = torch.randn(rows, d, device=device), torch.randn(*copies, rows, p, device=device)
    yield x, torch.randn(d, first, device=device)
    yield torch.randn(first, rows, device=device), x
    for _ in range(2):
        weight = torch.randn(*copies, p, p, device=device)
        yield hidden, weight
        yield hidden, weight.transpose(-1, -2)
        yield hidden.transpose(-1, -2), hidden


def _share(stored: tuple[Cache, StoredComparisons], device: str, *, quick: bool) -> Row:
    batch, rounds = (256, 2) if quick else (4_096, 5)
    task = Task.of(*stored, device, batch)
    steps = len(task.train) // batch
    drawn = task.train.batch(torch.randperm(len(task.train))[:batch].to(device))
    products = _products(task.shape, drawn, device)

    def bare() -> float:
        def run_all() -> None:
            for _ in range(steps):
                products.run()
            finish(device)

        return clock(run_all)

    seconds = in_turn({"ours": functools.partial(task.seconds, batch, 1), "bare": bare}, rounds)
    step = {name: statistics.median(values) / steps * 1e3 for name, values in seconds.items()}
    rate = {name: products.flops / value / 1e6 for name, value in step.items()}
    what = f"share of the matmul rate, PAL-B k = 2, d = p = 384, batch {batch:,}, float32, planted"
    unmeasured = row("train", what, device, against="bare matmuls of the same shapes", goal="0.7")
    measured = (
        f"{step['ours']:.1f} ms a step ({rate['ours']:,.0f} GFLOP/s) against {step['bare']:.1f} ms ({rate['bare']:,.0f}); "
        f"{len(drawn.responses):,} distinct responses and {len(drawn.prompts):,} prompts in a batch"
    )
    share = ratio(seconds["bare"], seconds["ours"])
    return unmeasured.with_ratio(share, 0.7, measured, _profile(task, batch, device))
