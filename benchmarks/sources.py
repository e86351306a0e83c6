"""What the benchmarks run on: texts, tables and caches, made here from a seed or taken from the project's data folder."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from palcache import Cache, Space
from palcache.comparisons import Column, Comparisons
from palcache.configs import EmbedConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.encoders.sentence import BUNDLED, MINILM
from palcache.fingerprints import Keys, text_keys
from palcache.sentences import TOPICS
from palcache.splits import split_comparisons
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.layouts import ShardHeader, create_shard
from palcache.storage.shards import ShardWriter
from palcache.synthetic import PlantedComparisons, draw_population, population_comparisons

DATA: Final = Path(__file__).parents[2] / "shared" / "data"
SHARD_ROWS: Final = EmbedConfig().shard_rows
TOKENS_PER_WORD: Final = 1.2
"""Of MiniLM on the sample's sentences."""


@functools.cache
def scratch() -> Path:
    """Return a folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="palcache-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def fresh(prefix: str) -> Iterator[Path]:
    """Yield names in the scratch folder that were never used."""
    return (scratch() / f"{prefix}-{number}" for number in count())


def data_file(name: str) -> Path | None:
    """Return a file of the data folder (`PALCACHE_DATA_DIR`, or `shared/data` beside the checkout), or None."""
    path = Path(os.environ.get("PALCACHE_DATA_DIR", DATA)) / name
    return path if path.is_file() else None


def minilm() -> str:
    """Return where sentence-transformers finds MiniLM: the bundled package, else the hub."""
    found = importlib.util.find_spec(BUNDLED)
    return str(Path(found.origin).parent / "model") if found and found.origin else MINILM


def mixed_texts(n: int, *, seed: int) -> list[str]:
    """Return n distinct texts of log-normal length, 5 to 256 tokens, cut out of the sample's sentences."""
    random = np.random.Generator(np.random.PCG64(seed))
    sentences = [text.split() for topic in TOPICS for text in (topic.prompt, *(r.text for r in topic.responses))]
    texts: dict[str, None] = {}
    while len(texts) < n:
        tokens = float(np.clip(random.lognormal(np.log(55), 0.8), 5, 254))
        wanted = max(3, round((tokens - 2) / TOKENS_PER_WORD))
        picked = random.integers(len(sentences), size=wanted // 8 + 2)
        words = list(chain.from_iterable(sentences[i] for i in picked))
        start = int(random.integers(0, min(8, len(words) - wanted) + 1)) if len(words) > wanted else 0
        texts[" ".join(words[start : start + wanted])] = None
    return list(texts)


def write_pairs(path: Path, responses: list[str], *, users: int = 10) -> list[str]:
    """Write a Parquet table with every two neighbours as one comparison; return its distinct texts."""
    prompts = [topic.prompt for topic in TOPICS]
    n = len(responses) // 2
    asked = [prompts[i % len(prompts)] for i in range(n)]
    table = {
        "user_id": [f"user-{i % users}" for i in range(n)],
        "prompt": asked,
        "response_1": responses[0 : 2 * n : 2],
        "response_2": responses[1 : 2 * n : 2],
        "y": [-1 if i % 3 else 1 for i in range(n)],
    }
    pyarrow.parquet.write_table(pa.table(table), path)
    return [*dict.fromkeys(asked), *responses[: 2 * n]]


@functools.cache
def embedded(name: str, config: EmbedConfig) -> Path:
    """Embed a table of the data folder once in this process; return the cache's folder."""
    path = data_file(name)
    assert path is not None, "the caller checks that the table is there"
    folder = scratch() / ("embedded-" + name.replace("/", "-"))
    embed_tables([path], folder, config=config)
    return folder


def random_vectors(rows: int, width: int, *, seed: int) -> npt.NDArray[np.float16]:
    """Return standard normal values in float16, (rows, width)."""
    random = np.random.Generator(np.random.PCG64(seed))
    return random.standard_normal((rows, width), dtype=np.float32).astype(np.float16)


def numbered_keys(prefix: str, n: int) -> Keys:
    """Return the keys of the texts `prefix0`, `prefix1`, ..., (n, 16)."""
    return text_keys(numbered(prefix, n))


def numbered(prefix: str, n: int) -> pa.Array:
    """Return the texts `prefix0`, `prefix1`, ..., a `large_string` array."""
    return pa.array([f"{prefix}{i}" for i in range(n)], pa.large_string())


def spec_of(role: str, width: int) -> dict[str, Any]:
    """Return a spec of float16 vectors that no model made."""
    return {"encoder": "benchmark", "role": role, "dtype": "float16", "width": width}


def add_vectors(
    cache: Cache,
    spec: Mapping[str, Any],
    keys: Keys,
    vectors: npt.NDArray[Any],
    *,
    shard_rows: int = SHARD_ROWS,
) -> Space:
    """Write vectors into a new space of a cache, as embedding would have left them.

    Args:
        cache: where to.
        spec: of the space.
        keys: (n, 16).
        vectors: (m, d) of the spec's dtype; where m < n they are repeated.
        shard_rows: rows per shard.
    """
    space_id = cache.add_space(spec, {"model": "benchmark"})
    for number, start in enumerate(range(0, len(keys), shard_rows)):
        rows = np.arange(start, min(start + shard_rows, len(keys)))
        header = ShardHeader(space_id, spec, len(rows), vectors.shape[1], spec["dtype"], {})
        _write_shard(cache, header, number, keys[rows], vectors, rows)
    return cache.space(space_id)


def _write_shard(
    cache: Cache, header: ShardHeader, number: int, keys: Keys, vectors: npt.NDArray[Any], rows: npt.NDArray[np.int64]
) -> None:
    folder = cache.path / "spaces" / header.space_id / "shards"
    partial = folder / f"{number:06d}.partial"
    n_tokens, flags = np.full(len(rows), 8, np.uint32), np.zeros(len(rows), np.uint8)
    create_shard(partial, header, keys, n_tokens, flags)
    writer = ShardWriter(partial)
    for at in range(0, len(rows), 4_096):
        block = vectors[rows[at : at + 4_096] % len(vectors)]
        norms = np.ones(len(block), np.float32)
        writer.write(np.arange(at, at + len(block)), block, norms)
    partial.rename(folder / f"{number:06d}-{writer.seal()}.h5")


def add_table(cache: Cache, name: str, comparisons: Comparisons, spaces: tuple[Space, Space]) -> StoredComparisons:
    """Store a table whose prompts and responses stand in two spaces."""
    ids = (spaces[0].space_id, spaces[1].space_id)
    stored = StoredComparisons(name, comparisons, comparisons.fingerprint(), (ids,), {})
    cache.put_comparisons(stored)
    return stored


def planted_cache(planted: PlantedComparisons, folder: Path, *, name: str) -> tuple[Cache, StoredComparisons]:
    """Write a planted population's vectors and answers as a cache."""
    cache, d = Cache.create(folder), planted.prompt_vectors.shape[1]
    prompts = numbered("prompt ", len(planted.prompt_vectors))
    responses = numbered("response ", len(planted.response_vectors))
    spaces = (
        add_vectors(cache, spec_of("prompt", d), text_keys(prompts), planted.prompt_vectors.astype(np.float16)),
        add_vectors(cache, spec_of("response", d), text_keys(responses), planted.response_vectors.astype(np.float16)),
    )
    comparisons = Comparisons(
        users=Column(numbered("user ", int(planted.user.max()) + 1), planted.user),
        prompts=Column(prompts, planted.prompt),
        responses=responses,
        response_1=planted.response_1,
        response_2=planted.response_2,
        y=planted.y,
    )
    comparisons = split_comparisons(comparisons, SplitConfig())
    return cache, add_table(cache, name, comparisons, spaces)


def small_planted(folder: Path) -> tuple[Cache, StoredComparisons]:
    """Write a cache of 2,048 comparisons and narrow vectors, for `--quick`."""
    population = draw_population(seed=1, users=4, k=2, d=32, p=32)
    planted = population_comparisons(population, seed=2, prompts=40, responses=300, per_user=512, temperature=0.1)
    return planted_cache(planted, folder, name="planted")
