"""repeats: a table that names few texts many times, each encoded once, against encoding every reference."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pyarrow.parquet

from benchmarks.encode import Stage1, encode_all, sentence_transformer
from benchmarks.measuring import Job, clock, devices, in_turn, ratio
from benchmarks.results import Row, row
from benchmarks.sources import data_file

TABLE = "convarg/seen_users.parquet"


def run(quick: bool) -> list[Row]:
    """Measure on the convarg table, on every device."""
    return [_measure(device, quick=quick) for device in devices()]


def _measure(device: str, *, quick: bool) -> Row:
    unmeasured = row(
        "repeats",
        "the convarg table, whole stage 1, float32",
        device,
        against="SentenceTransformer.encode on all references",
        goal="50",
    )
    path = data_file(TABLE)
    if path is None:
        return unmeasured.skipped(f"there is no {TABLE} (set PALCACHE_DATA_DIR)")
    references = _references(path)
    sample = 24 if quick else 1_000 if device == "cpu" else 10_000
    ours = Stage1.of(path, device, "float32")
    jobs: dict[str, Job] = {"ours": ours, "theirs": _scaled(references, sample, device)}
    seconds = in_turn(jobs, 1 if quick else 5, warm=not quick)
    measured = (
        f"{statistics.median(seconds['ours']):.1f} s for {ours.summary.encoded} texts named {ours.summary.references:,} "
        f"times, against {statistics.median(seconds['theirs']):.0f} s, scaled from {sample:,} references drawn anew in each "
        "round"
    )
    return unmeasured.with_ratio(ratio(seconds["theirs"], seconds["ours"]), 50, measured, ours.profile())


def _references(path: Path) -> list[str]:
    table = pyarrow.parquet.read_table(path, columns=["prompt", "response_1", "response_2"])
    return [text for name in table.column_names for text in table[name].to_pylist()]


def _scaled(references: list[str], sample: int, device: str) -> Job:
    """Return a job that encodes some references drawn at random; its seconds are scaled to all of them."""
    model, random = sentence_transformer(device, "float32"), np.random.Generator(np.random.PCG64(7))

    def encode() -> float:
        drawn = [references[i] for i in random.choice(len(references), sample, replace=False)]
        return clock(lambda: encode_all(model, drawn, device)) * len(references) / sample

    return encode
