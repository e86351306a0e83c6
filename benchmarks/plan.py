"""plan: read a million comparisons of three million distinct texts, key, deduplicate, split and look them up."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from benchmarks.measuring import clock
from benchmarks.results import Row, row
from benchmarks.sources import add_vectors, random_vectors, scratch
from palcache.cache import Cache
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import full_spec
from palcache.embedding.stages import embed_tables
from palcache.encoders import Role, TokenizedTexts
from palcache.fingerprints import text_keys

GOAL_SECONDS: Final = 60
GOAL_BYTES: Final = 2 * 2**30
_ROOT: Final = Path(__file__).parents[1]


@final
class NoEncoder:
    """Stands where an encoder would, so that planning alone is measured."""

    about: Mapping[str, Any] = {"model": "none"}
    versions: Mapping[str, str] = {}
    width, token_budget, workers, equal_lengths = 8, 1_024, 1, False

    def spec(self, role: Role) -> dict[str, Any]:
        """Return the spec of no encoder."""
        return {"encoder": "none", "for": role}

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:  # noqa: ARG002 - the protocol's
        """Return lengths guessed from the letters."""
        lengths = np.array([max(1, len(text) // 4) for text in texts], np.uint32)
        return TokenizedTexts(texts, lengths, np.zeros(len(texts), bool), np.zeros(1, np.int64), {})

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Refuse: planning encodes nothing."""
        raise NotImplementedError(f"planning encodes nothing, and here are {len(rows)} of {len(window.texts)} {role}s")


def run(quick: bool) -> list[Row]:
    """Measure in processes of their own, so that the memory is that of planning."""
    n, rounds = (2_000, 1) if quick else (1_000_000, 3)
    what = f"read {n:,} comparisons of {3 * n:,} distinct texts, keys, dedup, split, index"
    unmeasured = row("plan", what, "cpu", against="-", goal=f"{GOAL_SECONDS} s, under 2 GiB")
    table, cache = _write_table(n), _write_cache(n)
    found = [_plan_apart(table, cache) for _ in range(rounds)]
    seconds = statistics.median(each["seconds"] for each in found)
    memory = max(each["bytes"] for each in found)
    size = table.stat().st_size / 2**20
    measured = (
        f"{seconds:.1f} s ({', '.join(format(each['seconds'], '.1f') for each in found)}), {memory / 2**30:.2f} GiB at most; "
        f"{found[0]['hits']:,} of {found[0]['distinct']:,} texts found in the cache"
    )
    note = (
        f"a Parquet file of {size:.0f} MiB, texts of 40 to 200 letters; the cache holds every second response and has no "
        f"index yet; the process without planning takes {found[0]['start'] / 2**30:.2f} GiB; reading and splitting takes "
        f"{statistics.median(each['read'] for each in found):.1f} s of it"
    )
    good = seconds <= GOAL_SECONDS and memory < GOAL_BYTES
    return [unmeasured.with_verdict(good, measured, note=note)]


def _write_table(n: int) -> Path:
    """Write n comparisons whose texts are all different."""
    path = scratch() / "plan.parquet"
    users = pa.array([f"user {i % 1_000}" for i in range(n)])
    columns = {name: _texts(name, n) for name in ("prompt", "response_1", "response_2")}
    y = pa.array(np.where(np.arange(n) % 2, 1, -1))
    pyarrow.parquet.write_table(pa.table({"user_id": users, **columns, "y": y}), path)
    return path


def _texts(name: str, n: int) -> pa.Array:
    """Return n distinct texts of 40 to 200 letters."""
    letters = (
        "Everyday questions have replies for two opposite tastes, and some of them take more words to say it. " * 2
    )
    lengths = np.random.Generator(np.random.PCG64(len(name))).integers(30, 190, size=n)
    tails = pa.array([letters[:length] for length in range(190)]).take(pa.array(lengths))
    return pc.binary_join_element_wise(pa.array(np.arange(n)).cast(pa.string()), name, tails, " ")


def _write_cache(n: int) -> Path:
    """Write a cache that has a vector of each response_1."""
    cache, encoder = Cache.create(scratch() / "plan-cache"), NoEncoder()
    keys, vectors = text_keys(_texts("response_1", n)), random_vectors(4_096, encoder.width, seed=3)
    add_vectors(cache, full_spec(encoder, "response", EmbedConfig()), keys, vectors)
    return cache.path


def _plan_apart(table: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan", str(table), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _peak() -> int:
    """Return the greatest resident memory of this process so far, in bytes; a parent's is not counted where known."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1_024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1_024


def _plan_here(table: Path, cache: Path) -> None:
    start, summaries = _peak(), []
    seconds = clock(lambda: summaries.append(embed_tables([table], cache, encoder=NoEncoder(), plan=True)))
    (summary,) = summaries
    found = {
        "seconds": seconds,
        "read": summary.seconds["read"],
        "bytes": _peak(),
        "start": start,
        "hits": summary.hits,
        "distinct": sum(summary.distinct.values()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    _plan_here(Path(sys.argv[1]), Path(sys.argv[2]))
