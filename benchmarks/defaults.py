"""How the defaults of `train-head` were chosen: one change at a time, judged by validation loss over data sets and seeds.

Run with `python -m benchmarks.defaults`; it needs the real data of `PALCACHE_DATA_DIR` (default `../shared/data`) and takes
several minutes on two cores. It prints the table of `docs/defaults.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.heads import PalB, Parameters
from palcache.tables import read_comparisons
from palcache.tensors import PreferenceData, load_preferences
from palcache.training import FitState, fit, validate

DATA = Path(os.environ.get("PALCACHE_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


@dataclass(frozen=True, slots=True)
class Task:
    """A data set with its splits on vectors, and the number of prototypes to fit."""

    family: str
    k: int
    splits: dict[str, PreferenceData]


@dataclass(frozen=True, slots=True)
class Variant:
    """The defaults with one thing changed."""

    name: str
    head: dict[str, Any]
    fit: dict[str, Any]
    start: str = "palcache"


VARIANTS = (
    Variant("defaults", {}, {}),
    Variant("p = 32", {"p": 32}, {}),
    Variant("p = 128", {"p": 128}, {}),
    Variant("p = d", {"p": None}, {}),
    Variant("one hidden layer", {"projector": "mlp1-relu-dropout1"}, {}),
    Variant("no hidden layer", {"projector": "mlp0-linear-dropout0"}, {}),
    Variant("three hidden layers", {"projector": "mlp3-relu-dropout1"}, {}),
    Variant("GELU", {"projector": "mlp2-gelu-dropout1"}, {}),
    Variant("dropout 0", {"projector": "mlp2-relu-dropout0"}, {}),
    Variant("dropout 0.2", {"projector": "mlp2-relu-dropout2"}, {}),
    Variant("lr 3e-4", {}, {"lr": 3e-4}),
    Variant("lr 2e-3", {}, {"lr": 2e-3}),
    Variant("user lr 0.02", {}, {"lr_users": 0.02}),
    Variant("user lr 0.3", {}, {"lr_users": 0.3}),
    Variant("scale lr 0.1 (published)", {}, {"lr_scale": 0.1}),
    Variant("no warmup", {}, {"warmup": 0.0}),
    Variant("batch 64", {}, {"batch_size": 64}),
    Variant("independent prototypes", {}, {}, "independent"),
    Variant("users from N(0, 1)", {}, {}, "noisy users"),
    Variant("both (published start)", {}, {}, "published"),
)


def persona_comparisons(folder: Path, *, seed: int, users_per_group: int = 10, per_user: int = 140) -> Comparisons:
    """Return three groups of users, each agreeing with one persona's statements and with no other's; 10 % of labels flip."""
    names = ("agreeableness", "interest-in-math", "risk-seeking")
    statements = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in names
    }
    random = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for group in names:
        for user in range(users_per_group):
            for _ in range(per_user):
                persona = names[int(random.integers(len(names)))]
                item = statements[persona][int(random.integers(len(statements[persona])))]
                sides = [item["answer_matching_behavior"], item["answer_not_matching_behavior"]]
                likes = (persona == group) != (random.random() < 0.1)
                swap = bool(random.integers(2))
                left, right = (sides[1], sides[0]) if swap else (sides[0], sides[1])
                rows.append(
                    {"user_id": f"{group}-{user}", "prompt": item["question"], "response_1": left, "response_2": right,
                     "y": -1 if likes != swap else 1, "group": group}
                )  # fmt: skip
    return Comparisons.from_rows(rows, origin="persona")


def tasks(folder: Path) -> Iterator[Task]:
    """Embed the data sets once and yield the tasks."""
    sources: list[tuple[str, int, Comparisons | Path, SplitConfig]] = [
        ("length-rule, k = 2", 2, DATA / "length-rule" / "seen.parquet", SplitConfig()),
        ("length-rule, k = 5", 5, DATA / "length-rule" / "seen.parquet", SplitConfig()),
    ]
    convarg = DATA / "convarg" / "seen_users.parquet"
    sources += [("convarg, k = 2", 2, convarg, SplitConfig(by="pair", seed=seed)) for seed in range(3)]
    for seed in (1, 2):
        table = persona_comparisons(DATA / "persona", seed=seed)
        sources.append(("persona, k = 3", 3, table, SplitConfig(by="pair", seed=seed)))
    for i, (family, k, source, split) in enumerate(sources):
        table = read_comparisons([source]) if isinstance(source, Path) else source
        embed_tables(table, folder / "cache", name=f"t{i}", split=split)
        cache = Cache(folder / "cache")
        stored = cache.comparisons(f"t{i}")
        data = load_preferences(cache, stored, device="cpu")
        column = stored.comparisons.split
        assert column is not None
        names = column.values.to_pylist()
        yield Task(family, k, {part: data.take(np.flatnonzero(column.codes == names.index(part))) for part in names})


def start_of(shape: PalB, how: str, seed: int) -> Parameters:
    """Return initial parameters: palcache's, or with the published choices."""
    generator = torch.Generator().manual_seed(seed)
    parameters = shape.initial(generator)
    if how in {"independent", "published"}:
        drawn = shape.prototypes.initial(generator)
        parameters |= {f"g.{name}": value for name, value in drawn.items()}
    if how in {"noisy users", "published"}:
        parameters["user.logits"] = torch.randn(shape.users, shape.k, generator=generator)
    return parameters


def run_variant(variant: Variant, task: Task, seed: int) -> tuple[float, float, float, float]:
    """Return validation loss and accuracy, test accuracy, and seconds."""
    head = replace(HeadConfig(k=task.k), **variant.head)
    config = replace(FitConfig(seed=seed), **variant.fit)
    train = task.splits["train"]
    shape = PalB.from_config(head, d=train.width, users=len(train.users))
    start = start_of(shape, variant.start, seed)
    state = FitState(0, start, start, {}, ())
    result = fit(shape, train, task.splits["val"], config, state=state)
    loss, accuracy = validate(shape, result.parameters, task.splits["val"])
    _, test = validate(shape, result.parameters, task.splits["test"])
    return loss, accuracy, test, result.seconds


def main() -> None:
    """Print one line per variant: validation loss by task (mean, worst), and the mean over tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    chosen = [variant for variant in VARIANTS if not options.only or variant.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        found = list(tasks(Path(folder)))
        families = list(dict.fromkeys(task.family for task in found))
        print(f"| change | {' | '.join(f'{family}: val loss, worst, test' for family in families)} | seconds |")
        print("|---" * (len(families) + 2) + "|")
        for variant in chosen:
            print(_line(variant, found, families, options.seeds), flush=True)


def _line(variant: Variant, found: list[Task], families: list[str], seeds: int) -> str:
    """Return a row of the table: mean and worst validation loss and mean test accuracy by family of tasks."""
    cells, seconds = [], []
    for family in families:
        members = [task for task in found if task.family == family]
        results = [run_variant(variant, task, seed) for task in members for seed in range(seeds)]
        losses, tests = [r[0] for r in results], [r[2] for r in results]
        seconds += [r[3] for r in results]
        cells.append(f"{statistics.mean(losses):.3f}, {max(losses):.3f}, {statistics.mean(tests):.3f}")
    return f"| {variant.name} | {' | '.join(cells)} | {statistics.mean(seconds):.2f} |"


if __name__ == "__main__":
    main()
