"""Caches with token states grow, shrink and travel like any other: every state stays what it was."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from palcache.cache import Cache, Space
from palcache.care import export_jobs
from palcache.care.compactions import compact_cache
from palcache.care.exports import export_cache
from palcache.care.merges import merge_caches
from palcache.care.verification import reencode_sample, verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, ExportFormat, StoredDtype
from palcache.embedding.encoding import embed_comparisons
from palcache.encoders import States
from tests.state_stubs import StubStateEncoder
from tests.stubs import small_table

A, B = small_table(label="a"), small_table(prompts=4, responses=11, seed=1, label="b")
JOINT = EmbedConfig(dtype="float16", items="joint", tokens="responses", shard_rows=4)


def filled(
    path: Path, *tables: tuple[str, Comparisons], config: EmbedConfig = JOINT, encoder: StubStateEncoder | None = None
) -> Cache:
    for name, table in tables:
        embed_comparisons(table, encoder or StubStateEncoder(), Cache.create(path), name=name, config=config)
    return Cache(path)


def only(cache: Cache, role: str = "joint") -> Space:
    (space,) = [space for space in map(cache.space, cache.space_ids) if space.role == role]
    return space


def everything(space: Space, keys: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> list[torch.Tensor]:
    """Return all that a space holds of some keys."""
    rows = space.find(keys)
    assert (rows >= 0).all()
    states, offsets = space.tokens(rows)
    prompts = [space.rows(rows, which="prompt")] if space.role == "joint" else []
    return [space.rows(rows), states, offsets, space.token_ids(rows)[0], *prompts]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_compaction_joins_small_shards_of_token_states(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A), ("b", B))
    keys = cache.comparisons("b").joint_keys
    before = everything(only(cache), keys)
    cache.remove_comparisons("a")
    done = compact_cache(Cache(tmp_path / "c"))
    assert done.rows - done.rows_dropped == len(keys)
    after = only(Cache(tmp_path / "c"))
    assert len(after.shards) == 1
    assert same(before, everything(after, keys))
    assert verify_cache(Cache(tmp_path / "c")).problems == ()
    assert compact_cache(Cache(tmp_path / "c")).shards_rewritten == 0


def test_joined_shards_keep_to_the_bytes_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path / "c", ("a", A), ("b", B))
    keys = np.concatenate([shard.keys for shard in only(cache).shards])
    before, count = everything(only(cache), keys), len(only(cache).shards)
    most = 1_000
    monkeypatch.setattr("palcache.care.compactions.TOKEN_SHARD_BYTES", most)
    compact_cache(Cache(tmp_path / "c"))
    after = only(Cache(tmp_path / "c"))
    sizes = [int(shard.token_nbytes(np.arange(shard.header.rows)).sum()) for shard in after.shards]
    assert max(sizes) <= most
    assert 1 < len(sizes) < count
    assert same(before, everything(after, keys))
    assert compact_cache(Cache(tmp_path / "c")).shards_rewritten == 0


def test_a_row_larger_than_a_shard_has_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path / "c", ("a", A), ("b", B))
    cache.remove_comparisons("a")
    keys = cache.comparisons("b").joint_keys
    before = everything(only(cache), keys)
    monkeypatch.setattr("palcache.care.compactions.TOKEN_SHARD_BYTES", 8)
    compact_cache(Cache(tmp_path / "c"))
    assert same(before, everything(only(Cache(tmp_path / "c")), keys))


def test_shards_of_other_libraries_are_not_joined_and_not_rewritten_for_ever(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A), config=EmbedConfig(tokens="all"))
    cache = filled(tmp_path / "c", ("b", B), config=EmbedConfig(tokens="all"), encoder=StubStateEncoder(library="2"))
    names = [path.name for space_id in cache.space_ids for path in cache.shard_paths(space_id)]
    assert compact_cache(cache).shards_rewritten == 0
    assert names == [path.name for space_id in cache.space_ids for path in cache.shard_paths(space_id)]


KILLED = """
import os, signal, sys
from pathlib import Path
from palcache.cache import Cache
from palcache.care.compactions import compact_cache
from palcache.care.merges import merge_caches
calls, limit = 0, int(sys.argv[2])
def deadly(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls > limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.fsync = deadly(os.fsync)
Path.replace, Path.unlink = deadly(Path.replace), deadly(Path.unlink)
here = Path(sys.argv[1])
merge_caches([Cache(here / "1")], here / "c") if sys.argv[3] == "merge" else compact_cache(Cache(here / "c"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compact", "merge"])
def test_killed_anywhere_nothing_is_lost(what: str, tmp_path: Path) -> None:
    """A process killed at any of its steps leaves every wanted state, and the next one finishes the work."""
    config = EmbedConfig(items="joint", tokens="responses", dtype="int8", shard_rows=7)
    for limit in range(2, 60, 9):
        here = tmp_path / str(limit)
        cache = filled(here / "c", ("a", A), config=config)
        other = filled(here / "1", ("b", B), config=config)
        keys = cache.comparisons("a").joint_keys
        before = everything(only(cache), keys)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(here), str(limit), what],
            capture_output=True, text=True, check=False, env={**os.environ},
        )  # fmt: skip
        assert done.returncode in {0, -9}, done.stderr
        assert verify_cache(Cache(here / "c")).problems == ()
        assert same(before, everything(only(Cache(here / "c")), keys))
        if what == "compact":
            compact_cache(Cache(here / "c"))
        else:
            merge_caches([Cache(here / "1")], here / "c")
            theirs = other.comparisons("b").joint_keys
            assert same(everything(only(other), theirs), everything(only(Cache(here / "c")), theirs))
        assert same(before, everything(only(Cache(here / "c")), keys))
        assert verify_cache(Cache(here / "c")).problems == ()
        if done.returncode == 0:
            return
    pytest.fail("it never ran to its end")


def test_merging_takes_whole_shards_and_single_rows(tmp_path: Path) -> None:
    one = filled(tmp_path / "1", ("a", A.take(np.arange(9))))
    two = filled(tmp_path / "2", ("part", A.take(np.arange(5, 20))), ("b", B))
    done = merge_caches([one, two], tmp_path / "m")
    merged = Cache(tmp_path / "m")
    assert done.rows_known > 0
    for cache, name in ((one, "a"), (two, "part"), (two, "b")):
        keys = cache.comparisons(name).joint_keys
        assert same(everything(only(cache), keys), everything(only(merged), keys))
    assert done.rows_added == len(only(merged))
    assert verify_cache(merged).problems == ()
    again = merge_caches([one, two], tmp_path / "m")
    assert again.rows_added == 0


@pytest.mark.parametrize("form", ["safetensors", "parquet", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_exports_hold_token_states(
    form: ExportFormat, dtype: StoredDtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_jobs, "BLOCK_TOKENS", 13)  # blocks of a few rows
    config = EmbedConfig(dtype=dtype, items="joint", tokens="responses", shard_rows=4)
    cache = filled(tmp_path / "c", ("a", A), config=config)
    (one,) = export_cache(cache, tmp_path / "out", form=form)
    space = only(cache)
    stored = everything(space, np.concatenate([shard.keys for shard in space.shards]))
    assert (one.tokens, one.rows) == (space.token_count, len(space))
    if form == "safetensors":
        found = load_file(one.paths[0])
        assert found["token_values"].dtype == stored[1].dtype
        got = [found[f"{name}"] for name in ("vectors", "token_values", "token_offsets", "token_ids", "prompt_vectors")]
    elif form == "npy":
        by_name = {path.name.split(".")[1]: path for path in one.paths}
        names = ("vectors", "token_values", "token_offsets", "token_ids", "prompt_vectors")
        got = [torch.from_numpy(np.load(by_name[name])) for name in names]
    else:
        table = pyarrow.parquet.read_table(one.paths[0])
        ids, states = table["token_ids"].to_pylist(), table["token_states"].to_pylist()
        offsets = torch.tensor(np.concatenate([[0], np.cumsum([len(row) for row in ids])]))
        flat = torch.tensor([state for row in states for state in row], dtype=torch.float32)
        vectors = torch.tensor(np.stack(table["vector"].to_numpy()))
        prompts = torch.tensor(np.stack(table["prompt_vector"].to_numpy()))
        got = [vectors, flat, offsets, torch.tensor([one for row in ids for one in row]), prompts]
        assert table["prompt"].to_pylist()[0].startswith("aska")
    assert same([array.float() for array in got], [array.float() for array in stored])


@pytest.mark.parametrize("wrong", ["prompt", "tokens"])
def test_states_of_another_make_are_found_by_encoding_again(wrong: str, tmp_path: Path) -> None:
    """Pooled vectors alone do not show that token or prompt states came from elsewhere."""
    cache, encoder = filled(tmp_path / "c", ("a", A)), StubStateEncoder()
    compared, lowest, problems = reencode_sample(cache, encoder, 99)
    assert (compared, problems) == (len(only(cache)), ())
    assert lowest == pytest.approx(1.0, abs=1e-6)
    honest = encoder.encode_states

    def lying(*arguments: Any, **options: Any) -> States:
        states = honest(*arguments, **options)
        return replace(states, **{wrong: -getattr(states, wrong)})

    encoder.encode_states = lying  # type: ignore[method-assign]
    compared, lowest, problems = reencode_sample(cache, encoder, 7)
    assert (compared, len(problems)) == (7, 7)
    assert lowest < -0.99
