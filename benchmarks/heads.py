"""All heads on the same vectors and splits: mean and standard deviation over seeds of the accuracy on the test split.

Run with `python -m benchmarks.heads`; it needs the real data of `PALCACHE_DATA_DIR` (default `../shared/data`) and takes a
quarter of an hour on one core. It prints the table of `docs/heads.md`. A seed draws the split where the data has none, the
parameters and the order of the comparisons; every head is trained with the defaults but for what its row says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.heads import build_head
from palcache.splits import split_comparisons
from palcache.tables import read_comparisons
from palcache.tensors import PreferenceData, load_preferences
from palcache.training import fit, validate

DATA = Path(os.environ.get("PALCACHE_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
TABLES = {"convarg": DATA / "convarg" / "seen_users.parquet", "length-rule": DATA / "length-rule" / "seen.parquet"}


@dataclass(frozen=True, slots=True)
class Row:
    """A head of the table."""

    name: str
    head: dict[str, Any]
    fit: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("PAL-B, k = 1 (user-blind)", {"k": 1}),
    Row("PAL-B, `angle` (default)", {}),
    Row("PAL-B, `angle_hinge`", {"score": "angle_hinge"}),
    Row("PAL-B, `dist`", {"score": "dist"}),
    Row("PAL-B, `dist_normalized`", {"score": "dist_normalized"}),
    Row("PAL-B, `dist_logistic`", {"score": "dist_logistic"}),
    Row("PAL-B, `angle`, batchnorm", {"projector": "mlp2-relu-dropout1-batchnorm"}),
    Row("PAL-B, `angle`, partition", {"mixture": "partition"}),
    Row("PAL-B, `angle`, Gumbel", {"mixture": "gumbel"}),
    Row("PAL-A, `f(Pw)`, `dist`", {"head": "pal-a"}),
    Row("PAL-A, `f(P)w`, `dist`", {"head": "pal-a", "user_form": "f(P)w"}),
    Row("PAL-A, `Pw`, `dist`", {"head": "pal-a", "user_form": "Pw"}),
    Row("PAL-A, `\\|f(P)\\|w`, `dist`", {"head": "pal-a", "user_form": "|f(P)|w"}),
    Row("PAL-A, `f(Pw)`, `angle`", {"head": "pal-a", "score": "angle"}),
    Row("Bradley-Terry, linear", {"head": "bradley-terry", "projector": "identity"}),
    Row("Bradley-Terry, MLP", {"head": "bradley-terry"}),
    Row("low-rank, simplex, k = 2", {"head": "low-rank"}),
    Row("low-rank, free, k = 2", {"head": "low-rank", "user_weights": "free"}),
    Row("principal directions, k = 16", {"head": "pca", "k": 16}),
    Row("a logistic regression per user", {"head": "per-user"}),
)


@dataclass(frozen=True, slots=True)
class Task:
    """A data set: responses alone and with their prompts, row by row the same comparisons."""

    name: str
    comparisons: Comparisons
    alone: PreferenceData
    joint: PreferenceData

    def splits(self, seed: int, *, joint: bool) -> dict[str, PreferenceData]:
        """Return the splits of a seed, users numbered by those with training comparisons."""
        by = SplitConfig(seed=seed, by="column" if self.name == "length-rule" else "pair")
        column = split_comparisons(self.comparisons, by).split
        assert column is not None
        names = column.values.to_pylist()
        data = self.joint if joint else self.alone
        rows = {part: np.flatnonzero(column.codes == names.index(part)) for part in names}
        users = self.comparisons.users.take(rows["train"]).values.to_pylist()
        out = {part: data.take(at).with_users(users) for part, at in rows.items()}
        return {part: split.take(np.flatnonzero(split.user.numpy() >= 0)) for part, split in out.items()}


def tasks(folder: Path) -> list[Task]:
    """Embed each data set twice: responses alone, and prompt and response as one text."""
    out = []
    for name, path in TABLES.items():
        comparisons = read_comparisons([path])
        prompts = np.asarray(comparisons.prompts.values.to_pylist(), object)[comparisons.prompts.codes]
        responses = np.asarray(comparisons.responses.to_pylist(), object)
        pair = np.concatenate([prompts + "\n" + responses[s] for s in (comparisons.response_1, comparisons.response_2)])
        texts, codes = np.unique(pair, return_inverse=True)
        sides = codes.astype(np.int32).reshape(2, -1)
        both = replace(
            comparisons, responses=pa.array(texts.tolist(), pa.large_string()), response_1=sides[0], response_2=sides[1]
        )
        loaded = []
        for kind, table in (("alone", comparisons), ("joint", both)):
            embed_tables(table, folder / "cache", name=f"{name}-{kind}", split=SplitConfig(by="row"))
            cache = Cache(folder / "cache")
            loaded.append(load_preferences(cache, cache.comparisons(f"{name}-{kind}"), device="cpu"))
        out.append(Task(name, comparisons, loaded[0], replace(loaded[1], joint=True)))
    return out


def run(row: Row, task: Task, seed: int) -> tuple[float, float]:
    """Return test accuracy and seconds of training."""
    config = HeadConfig(**row.head)
    splits = task.splits(seed, joint=config.head == "pal-a")
    shape = build_head(config, d=splits["train"].width, users=len(splits["train"].users))
    start = time.perf_counter()
    result = fit(shape, splits["train"], splits["val"], FitConfig(seed=seed, **row.fit))
    seconds = time.perf_counter() - start
    return validate(shape, result.parameters, splits["test"])[1], seconds


def main() -> None:
    """Print one line per head."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="parts of the names of rows")
    options = parser.parse_args()
    chosen = [row for row in ROWS if not options.only or any(part in row.name for part in options.only)]
    with tempfile.TemporaryDirectory() as folder:
        found = tasks(Path(folder))
        print(f"| head | {' | '.join(task.name for task in found)} | seconds |")
        print("|---" * (len(found) + 2) + "|")
        for row in chosen:
            cells, seconds = [], []
            for task in found:
                results = [run(row, task, seed) for seed in range(options.seeds)]
                accuracy = [r[0] for r in results]
                spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
                cells.append(f"{statistics.mean(accuracy):.3f} ± {spread:.3f}")
                seconds += [r[1] for r in results]
            print(f"| {row.name} | {' | '.join(cells)} | {statistics.mean(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
