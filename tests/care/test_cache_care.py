"""Growth and care: tables listed and removed, caches compacted, merged and exported, whatever stops the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from palcache.cache import Cache
from palcache.care.compactions import compact_cache
from palcache.care.exports import export_cache
from palcache.care.merges import merge_caches
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, ExportFormat
from palcache.embedding.encoding import embed_comparisons
from palcache.errors import CacheError, InputError, MismatchError, StorageError
from palcache.fingerprints import hex_key, text_keys
from palcache.storage.claims import make_claim
from palcache.storage.locks import rewriting, writing
from tests.stubs import StubEncoder, contents, flip_bit, small_table, texts_of

SMALL = EmbedConfig(dtype="float32", shard_rows=4)


def filled(path: Path, *tables: tuple[str, Comparisons], encoder: StubEncoder | None = None) -> Cache:
    """Return a cache of some tables by one encoder."""
    cache = Cache.create(path)
    for name, table in tables:
        embed_comparisons(table, encoder or StubEncoder(batch_sensitive=False), cache, name=name, config=SMALL)
    return Cache(path)


def vectors_of(cache: Cache, table: Comparisons, space: int) -> torch.Tensor:
    """Return a table's prompt (0) or response (1) vectors, in its order."""
    space_id = cache.comparisons(cache.comparison_names[0]).spaces[0][space]
    opened = cache.space(space_id)
    rows = opened.find(text_keys(table.prompts.values if space == 0 else table.responses))
    assert (rows >= 0).all()
    return opened.rows(rows)


def shard_names(cache: Cache) -> list[str]:
    return [path.name for space_id in cache.space_ids for path in cache.shard_paths(space_id)]


A, B = small_table(label="a"), small_table(prompts=7, responses=17, seed=1, label="b")


def test_removing_a_table_keeps_its_vectors_until_compaction(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A), ("b", B))
    wanted = vectors_of(cache, A, 1)
    cache.remove_comparisons("b")
    assert cache.comparison_names == ["a"]
    rows = sum(len(cache.space(space_id)) for space_id in cache.space_ids)
    assert rows == 5 + 13 + 7 + 17
    done = compact_cache(cache)
    assert (done.rows, done.rows_dropped, done.spaces_dropped) == (rows, 24, ())
    assert done.nbytes_after is not None
    assert done.nbytes_after < done.nbytes
    after = Cache(tmp_path / "c")
    assert sum(len(after.space(space_id)) for space_id in after.space_ids) == 18
    assert torch.equal(vectors_of(after, A, 1), wanted)
    assert verify_cache(after).problems == ()


def test_removing_an_unknown_table_is_refused(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A))
    with pytest.raises(InputError, match=r"no comparison table zebra to remove; it has a\."):
        cache.remove_comparisons("zebra")


def test_compaction_drops_spaces_of_dropped_tables(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A))
    filled(tmp_path / "c", ("b", B), encoder=StubEncoder(identity="other"))
    cache = Cache(tmp_path / "c")
    assert len(cache.space_ids) == 4
    cache.remove_comparisons("b")
    planned = compact_cache(cache, plan=True)
    assert len(Cache(tmp_path / "c").space_ids) == 4
    done = compact_cache(cache)
    assert done.spaces_dropped == planned.spaces_dropped
    assert len(done.spaces_dropped) == 2
    assert sorted(path.name for path in (tmp_path / "c/spaces").iterdir()) == Cache(tmp_path / "c").space_ids
    assert verify_cache(Cache(tmp_path / "c")).problems == ()


def test_compaction_drops_failed_rows_and_repeats_and_joins_small_shards(tmp_path: Path) -> None:
    bad = texts_of(A, "response")[2]
    cache = filled(tmp_path / "c", ("a", A), encoder=StubEncoder(fails_on=frozenset({bad})))
    space_id = cache.comparisons("a").spaces[0][1]
    path = cache.shard_paths(space_id)[-1]
    copy = path.with_name(f"000099-{path.stem[7:]}.h5")  # a second writer that committed the same keys
    copy.write_bytes(path.read_bytes())
    before, repeated = len(Cache(tmp_path / "c").space(space_id)), 1
    done = compact_cache(Cache(tmp_path / "c"))
    space = Cache(tmp_path / "c").space(space_id)
    assert len(space) == 12
    assert before == 13 + repeated
    assert done.rows_dropped >= 1 + repeated
    assert len(space.shards) == 1
    assert hex_key(text_keys(A.responses)[2]) in (space.folder / "failed.jsonl").read_text()
    again = compact_cache(Cache(tmp_path / "c"))
    assert (again.rows_dropped, again.shards_rewritten) == (0, 0)


def test_compaction_leaves_whole_shards_alone(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A))
    before = contents(tmp_path / "c")
    assert compact_cache(cache, shard_rows=4).shards_rewritten == 0
    assert contents(tmp_path / "c") == {**before, **{k: v for k, v in contents(tmp_path / "c").items() if "lock" in k}}


KILLED = """
import os, signal, sys
from pathlib import Path
from palcache import cache as caches, files
from palcache.cache import Cache
from palcache.care.compactions import compact_cache
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
compact_cache(Cache(Path(sys.argv[1])))
print("finished")
"""


@pytest.mark.slow
def test_compaction_killed_anywhere_leaves_every_wanted_vector(tmp_path: Path) -> None:
    """Killed at each durable step in turn: the cache is sound, and compacting again ends the same."""
    source = filled(tmp_path / "source", ("a", A), ("b", B))
    wanted = vectors_of(source, A, 1)
    source.remove_comparisons("b")
    for limit in range(0, 60, 3):
        path = tmp_path / f"c{limit}"
        subprocess.run(["cp", "-r", str(tmp_path / "source"), str(path)], check=True)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(limit)], capture_output=True, text=True, check=False
        )
        assert done.returncode in {0, -9}, done.stderr
        assert verify_cache(Cache(path)).problems == ()
        assert torch.equal(vectors_of(Cache(path), A, 1), wanted)
        compact_cache(Cache(path))
        again = Cache(path)
        assert sum(len(again.space(space_id)) for space_id in again.space_ids) == 18
        assert verify_cache(again).problems == ()
        assert not list(path.rglob("*.tmp"))
        if done.returncode == 0:
            return
    pytest.fail("compaction never ran to its end")


def test_compaction_refuses_a_living_writer(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A))
    with writing(cache.path), pytest.raises(CacheError, match="is being written by another process; wait"):
        compact_cache(cache)
    space = cache.space(cache.space_ids[0])
    claim = make_claim(space.shard_folder, 77, text_keys(B.responses))
    with pytest.raises(CacheError, match=rf"is being written by process {os.getpid()} on .*; wait for it to end"):
        compact_cache(cache)
    claim.release()
    with pytest.raises(CacheError, match=r"has 1 unfinished shard\(s\) .* or drop its work with --drop-unfinished"):
        compact_cache(cache)
    compact_cache(cache, drop_unfinished=True)
    assert not list(space.shard_folder.glob("*.claim"))


def test_compaction_refuses_damage_and_senseless_sizes(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A))
    flip_bit(cache.shard_paths(cache.space_ids[0])[0], 4096 + 5)
    with pytest.raises(CacheError, match=r"is damaged .* run palcache cache verify .* --repair first"):
        compact_cache(cache)
    with pytest.raises(InputError, match="Got shard_rows = 0; expected at least 1"):
        compact_cache(cache, shard_rows=0)


def test_a_writer_waits_while_the_cache_is_rewritten(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A))
    script = (
        "import sys, warnings; from pathlib import Path; from palcache.storage.locks import writing\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    print('at the door', flush=True)\n"
        "    with writing(Path(sys.argv[1])): print('in', str(said[0].message))\n"
    )
    with rewriting(cache.path):
        process = subprocess.Popen([sys.executable, "-c", script, str(cache.path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "at the door\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
    assert "is being compacted, merged or repaired by another process; waiting" in process.communicate(timeout=30)[0]


def test_readers_survive_a_compaction(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A), ("b", B))
    space = cache.space(cache.comparisons("a").spaces[0][1])
    before = space.tensor().clone()
    cache.remove_comparisons("b")
    compact_cache(Cache(tmp_path / "c"))
    assert torch.equal(space.tensor(), before)


def test_merging_joins_rows_without_repeats_and_tables_by_name(tmp_path: Path) -> None:
    one, two = filled(tmp_path / "1", ("a", A)), filled(tmp_path / "2", ("a", A), ("b", B))
    done = merge_caches([one, two], tmp_path / "m")
    merged = Cache(tmp_path / "m")
    assert done.tables == ("a", "b")
    assert (done.rows_added, done.rows_known) == (18 + 24, 18)
    assert len(done.spaces_added) == 2
    assert verify_cache(merged).problems == ()
    assert torch.equal(vectors_of(merged, A, 1), vectors_of(one, A, 1))
    before = contents(tmp_path / "m")
    again = merge_caches([one, two], tmp_path / "m")
    assert (again.rows_added, again.rows_known) == (0, 60)
    assert contents(tmp_path / "m") == before


def test_merging_keeps_encoders_apart_and_leaves_failed_rows(tmp_path: Path) -> None:
    bad = texts_of(A, "response")[3]
    one = filled(tmp_path / "1", ("a", A), encoder=StubEncoder(fails_on=frozenset({bad})))
    two = filled(tmp_path / "2", ("a", A), encoder=StubEncoder(identity="other"))
    done = merge_caches([one, two], tmp_path / "m")
    assert done.rows_failed == 1
    assert len(Cache(tmp_path / "m").comparisons("a").spaces) == 2
    assert len(Cache(tmp_path / "m").space_ids) == 4


def test_merging_refuses_what_does_not_fit(tmp_path: Path) -> None:
    one = filled(tmp_path / "1", ("a", A))
    with pytest.raises(InputError, match="No cache to merge was given"):
        merge_caches([], tmp_path / "m")
    with pytest.raises(InputError, match="would be merged into itself"):
        merge_caches([one], tmp_path / "1")
    other = filled(tmp_path / "2", ("a", B))
    with pytest.raises(
        InputError, match=r"The table a of .*/2 \(fingerprint .{8}\) is not the table a of .*/1 \(.{8}\)"
    ):
        merge_caches([one, other], tmp_path / "m")
    assert shard_names(Cache(tmp_path / "m")) == []
    manifest = json.loads((tmp_path / "1/palcache.json").read_text())
    next(iter(manifest["spaces"].values()))["spec"]["prefix"] = "changed: "
    (tmp_path / "1/palcache.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match=r"holds the spec of .* under the name .* --repair first"):
        merge_caches([Cache(tmp_path / "1")], tmp_path / "m")
    flip_bit(other.shard_paths(other.space_ids[0])[0], 4096 + 5)
    with pytest.raises(CacheError, match=r"is damaged .*, so it is not merged"):
        merge_caches([other], tmp_path / "m")


@pytest.mark.parametrize("form", ["safetensors", "parquet", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exports_hold_vectors_keys_and_texts(tmp_path: Path, form: ExportFormat, dtype: str) -> None:
    config = EmbedConfig.from_options(dtype=dtype, shard_rows=4)
    cache = Cache.create(tmp_path / "c")
    embed_comparisons(A, StubEncoder(), cache, name="a", config=config)
    embed_comparisons(B, StubEncoder(), cache, name="b", config=config)
    cache.remove_comparisons("b")
    cache = Cache(tmp_path / "c")
    (one,) = export_cache(cache, tmp_path / "out", form=form, spaces=["response"])
    assert (one.rows, one.texts, one.role) == (30, 13, "response")
    space = cache.space(one.space_id)
    stored = space.tensor()
    if form == "safetensors":
        found = load_file(one.paths[0])
        vectors, keys = found["vectors"], found["keys"].numpy()
        assert vectors.dtype == stored.dtype
        at, body = found["text_offsets"].tolist(), found["text_bytes"].numpy().tobytes()
        texts = [body[start:end].decode() or None for start, end in zip(at[:-1], at[1:], strict=True)]
    elif form == "parquet":
        table = pyarrow.parquet.read_table(one.paths[0])
        vectors = torch.tensor(np.stack(table["vector"].to_numpy()))
        keys = np.frombuffer(b"".join(table["key"].to_pylist()), np.uint8).reshape(-1, 16)
        texts = table["text"].to_pylist()
    else:
        vectors, keys = torch.from_numpy(np.load(one.paths[0])), np.load(one.paths[1])
        texts = [json.loads(line)["text"] for line in one.paths[2].read_text().splitlines()]
    assert torch.equal(vectors.float(), stored.float())
    assert (space.find(keys) == np.arange(30)).all()
    known = {hex_key(key): text for key, text in zip(text_keys(A.responses), texts_of(A, "response"), strict=True)}
    assert texts == [known.get(hex_key(key)) for key in keys]


def test_export_refuses_an_unknown_space_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", ("a", A))
    with pytest.raises(InputError, match=r"Got --space zebra; .* has the spaces .{8} \((prompt|response)\), "):
        export_cache(cache, tmp_path / "out", spaces=["zebra"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        export_cache(cache, tmp_path / "file")
