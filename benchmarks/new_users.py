"""How new users are adapted, on real comparisons: every method, over data sets and seeds of the head.

Run with `python -m benchmarks.new_users`; it needs the real data of `PALCACHE_DATA_DIR` (default `../shared/data`), and
prints the tables of `docs/new_users.md`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.defaults import DATA, persona_comparisons
from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.runs.adapted import AdaptedRun, adapt_run
from palcache.runs.trainings import train_run
from palcache.tables import read_comparisons
from palcache.users.adaptation import MethodName

METHODS: tuple[MethodName, ...] = ("published", "likelihood", "map")


@dataclass(frozen=True, slots=True)
class Task:
    """Seen and new users of one source, and the prototypes to fit."""

    name: str
    k: int
    seen: Comparisons
    new: Comparisons


def persona_tables(*, seed: int = 1) -> tuple[Comparisons, Comparisons]:
    """Return three persona groups of ten seen and ten new users each (K* = 3)."""
    everyone = persona_comparisons(DATA / "persona", seed=seed, users_per_group=20)
    names: list[str] = everyone.users.values.to_pylist()
    new = np.array([int(name.rsplit("-", 1)[1]) >= 10 for name in names])[everyone.users.codes]
    return everyone.take(np.flatnonzero(~new)), everyone.take(np.flatnonzero(new))


def tasks() -> Iterator[Task]:
    """Yield the data sets."""
    convarg = [read_comparisons([DATA / "convarg" / f"{name}.parquet"]) for name in ("seen_users", "new_users")]
    length = [read_comparisons([DATA / "length-rule" / f"{name}.parquet"]) for name in ("seen", "new")]
    yield Task("convarg, k = 2", 2, *convarg)
    yield Task("length-rule, k = 2", 2, *length)
    yield Task("length-rule, k = 5", 5, *length)
    yield Task("persona, k = 3", 3, *persona_tables())


def curves(task: Task, seed: int, folder: Path) -> dict[MethodName, AdaptedRun]:
    """Return the learning curve of every method on one head."""
    split = SplitConfig(seed=1) if task.seen.split is None else SplitConfig()
    embed_tables(task.seen, folder / "cache", name="seen", split=split)
    embed_tables(task.new, folder / "cache", name="new", split=split)
    cache, run = Cache(folder / "cache"), folder / f"run-{seed}"
    train_run(cache, run, comparisons="seen", head=HeadConfig(k=task.k), config=FitConfig(seed=seed), device="cpu")
    return {method: adapt_run(run, cache, "new", method=method, device="cpu") for method in METHODS}


def main() -> None:
    """Print a table per data set: mean accuracy over seeds and draws by method and n, and the worst seed of map."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    for task in tasks():
        with tempfile.TemporaryDirectory() as folder:
            found = [curves(task, seed, Path(folder)) for seed in range(options.seeds)]
        _print(task, found)


def _print(task: Task, found: list[dict[MethodName, AdaptedRun]]) -> None:
    shots = [point.shots for point in found[0]["map"].points]
    print(f"\n{task.name}, {len(found)} seeds x 5 draws\n")
    print(f"| query accuracy (micro) | {' | '.join(f'n = {n}' for n in shots)} |\n|---{'|---' * len(shots)}|")
    values = {
        method: np.array([[p.evaluation.accuracy["micro"].value for p in by[method].points] for by in found])
        for method in METHODS
    }
    for method in METHODS:
        print(f"| {method} | {' | '.join(f'{value:.4f}' for value in values[method].mean(0))} |")
    print(f"| map, worst seed | {' | '.join(f'{value:.4f}' for value in values['map'].min(0))} |")
    gains = np.array([[p.gain.value for p in by["map"].points] for by in found]).mean(0)
    print(f"| map above n = 0, same users (macro) | {' | '.join(f'{value:+.4f}' for value in gains)} |", flush=True)


if __name__ == "__main__":
    main()
