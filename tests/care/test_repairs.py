"""A flipped bit anywhere in a shard is found by verify and mended by repair; what cannot be mended is counted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palcache.cache import Cache
from palcache.care.repairs import Repair, repair_cache
from palcache.care.verification import verify_cache
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import embed_comparisons
from palcache.encoders import Encoder
from palcache.errors import CacheError, MismatchError
from palcache.fingerprints import text_keys
from palcache.storage.layouts import dataset_places
from palcache.storage.locks import writing
from tests.stubs import StubEncoder, as_encoder, contents, differing, flip_bit, small_table

TABLE = small_table(prompts=7, responses=23)
CONFIG = EmbedConfig(dtype="float32", shard_rows=9)


def make_cache(path: Path) -> Cache:
    """Return a cache of three shards of responses and one of prompts."""
    embed_comparisons(TABLE, StubEncoder(), Cache.create(path), name="table", config=CONFIG)
    return Cache(path)


def stub() -> Encoder:
    return as_encoder(StubEncoder())


def no_model() -> Encoder:
    raise AssertionError("the model is not needed")


def mend(path: Path) -> Repair:
    return repair_cache(Cache(path), stub, config=CONFIG)


def response_shard(cache: Cache, at: int = 1) -> Path:
    return cache.shard_paths(cache.comparisons("table").spaces[0][1])[at]


def rubbish(folder: Path) -> list[str]:
    endings = (".tmp", ".damaged", ".claim", ".partial")
    return [path.name for path in folder.rglob("*") if path.name.endswith(endings)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sound cache; tests work on copies."""
    return make_cache(tmp_path_factory.mktemp("sound") / "c").path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "c")
    return tmp_path / "c"


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), shard=st.integers(0, 2))
def test_a_flipped_bit_anywhere_is_found_and_mended(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, shard: int
) -> None:
    """The mended cache is the sound one, byte for byte."""
    path = tmp_path_factory.mktemp("flipped") / "c"
    shutil.copytree(sound, path)
    damaged = response_shard(Cache(path), shard)
    flip_bit(damaged, int(place * damaged.stat().st_size), bit)
    problems = verify_cache(Cache(path)).problems
    assert any(damaged.name in problem for problem in problems)
    done = mend(path)
    assert done.rows_lost == 0
    assert verify_cache(Cache(path)).problems == ()
    names = [name for name in differing(contents(sound), contents(path)) if "/." not in name and name[0] != "."]
    assert names == []
    assert done.shards_restored == 1
    assert rubbish(path) == []
    shutil.rmtree(path)


def test_a_bit_of_every_dataset_and_of_the_header_is_mended(sound: Path, tmp_path: Path) -> None:
    places = dataset_places(response_shard(Cache(sound)))
    offsets = {name: offset for name, (offset, _, _) in places.items()} | {"signature": 2, "superblock": 20, "end": -1}
    for name, offset in offsets.items():
        path = tmp_path / name.replace("/", "-")
        shutil.copytree(sound, path)
        damaged = response_shard(Cache(path))
        flip_bit(damaged, offset % damaged.stat().st_size, 5)
        assert verify_cache(Cache(path)).problems, name
        done = mend(path)
        assert (done.shards_restored, done.rows_lost) == (1, 0), name
        assert verify_cache(Cache(path)).problems == (), name


def test_damage_outside_the_rows_needs_no_model(copy: Path) -> None:
    damaged = response_shard(Cache(copy))
    flip_bit(damaged, 3)  # HDF5's signature
    done = repair_cache(Cache(copy), no_model)
    assert (done.shards_restored, done.rows_encoded) == (1, 0)
    assert verify_cache(Cache(copy)).problems == ()


def test_only_damaged_rows_are_encoded_again(copy: Path, tmp_path: Path) -> None:
    damaged = response_shard(Cache(copy))
    flip_bit(damaged, dataset_places(damaged)["emb/pooled"][0])
    log = tmp_path / "log"
    done = repair_cache(Cache(copy), lambda: as_encoder(StubEncoder(log=log)), config=CONFIG)
    assert done.rows_encoded == 9  # one block of 4,096 rows is the whole small shard
    assert len(log.read_text().splitlines()) == 9


@pytest.mark.parametrize("size", [0, 100, 5_000, 20_000])
def test_a_shard_cut_short_is_mended(copy: Path, sound: Path, size: int) -> None:
    damaged = response_shard(Cache(copy))
    with damaged.open("r+b") as file:
        file.truncate(size)
    assert mend(copy).rows_lost == 0
    assert verify_cache(Cache(copy)).problems == ()
    assert len(contents(copy)) <= len(contents(sound)) + 1  # the same rows, if not in the same shards


def test_a_missing_shard_is_encoded_again_and_the_journal_kept_true(copy: Path) -> None:
    missing = response_shard(Cache(copy))
    missing.unlink()
    assert any("is in the journal and not in its folder" in problem for problem in verify_cache(Cache(copy)).problems)
    done = mend(copy)
    assert (done.rows_encoded, done.rows_lost) == (9, 0)
    assert verify_cache(Cache(copy)).problems == ()
    cache = Cache(copy)
    journal = {json.loads(line)["shard"] for line in (copy / "journal.jsonl").read_text().splitlines()}
    assert journal == {path.name for space_id in cache.space_ids for path in cache.shard_paths(space_id)}


def test_rows_without_a_text_are_counted_and_left_out(copy: Path) -> None:
    """The table is gone: damaged rows cannot be mended, rows of other shards stay."""
    other = small_table(prompts=3, responses=4, seed=5, label="other")
    embed_comparisons(other, StubEncoder(), Cache.create(copy), name="other", config=CONFIG)
    damaged = response_shard(Cache(copy))
    Cache(copy).remove_comparisons("table")
    flip_bit(damaged, dataset_places(damaged)["norm"][0])
    done = mend(copy)
    assert (done.rows_lost, done.rows_encoded, done.shards_restored) == (9, 0, 0)
    assert verify_cache(Cache(copy)).problems == ()
    assert sum(len(Cache(copy).space(space_id)) for space_id in Cache(copy).space_ids) == 7 + 23 + 3 + 4 - 9


def test_a_lost_key_without_a_text_is_counted(copy: Path) -> None:
    other = small_table(prompts=3, responses=4, seed=5, label="other")
    embed_comparisons(other, StubEncoder(), Cache.create(copy), name="other", config=CONFIG)
    damaged = response_shard(Cache(copy))
    Cache(copy).remove_comparisons("table")
    flip_bit(damaged, dataset_places(damaged)["key"][0])
    assert mend(copy).rows_lost == 9
    assert verify_cache(Cache(copy)).problems == ()


def test_the_spec_in_the_manifest_is_taken_from_a_shard(copy: Path, sound: Path) -> None:
    manifest = json.loads((copy / "palcache.json").read_text())
    for entry in manifest["spaces"].values():
        entry["spec"]["prefix"] = "damaged"
    (copy / "palcache.json").write_text(json.dumps(manifest))
    assert any("is not the one that it was named for" in problem for problem in verify_cache(Cache(copy)).problems)
    assert repair_cache(Cache(copy), no_model).specs_restored == 2
    assert (copy / "palcache.json").read_bytes() == (sound / "palcache.json").read_bytes()


def test_a_damaged_index_is_built_again(copy: Path) -> None:
    cache = Cache(copy)
    for space_id in cache.space_ids:
        index = copy / "spaces" / space_id / "index.h5"
        index.write_bytes(index.read_bytes()[:-40] + bytes(40))
    repair_cache(Cache(copy), no_model)
    assert verify_cache(Cache(copy)).problems == ()


def test_a_sound_cache_is_left_as_it_is(copy: Path, sound: Path) -> None:
    assert repair_cache(Cache(copy), no_model) == Repair(0, 0, 0, 0, 0, 0)
    assert [name for name in differing(contents(sound), contents(copy)) if not name.startswith(".")] == []


def test_another_model_is_refused_with_the_fields_that_differ(copy: Path) -> None:
    damaged = response_shard(Cache(copy))
    flip_bit(damaged, dataset_places(damaged)["emb/pooled"][0])
    before = contents(copy)
    other = as_encoder(StubEncoder(identity="other", compute_dtype="bfloat16"))
    with pytest.raises(
        MismatchError, match=r"written by the encoder other: the nearest differs in compute_dtype, identity; name"
    ):
        repair_cache(Cache(copy), lambda: other)
    assert [name for name in differing(before, contents(copy)) if name.endswith(".h5")] == []


def test_other_libraries_encode_the_whole_shard_again(copy: Path) -> None:
    damaged = response_shard(Cache(copy))
    flip_bit(damaged, dataset_places(damaged)["emb/pooled"][0])
    done = repair_cache(Cache(copy), lambda: as_encoder(StubEncoder(library="2")), config=CONFIG)
    assert (done.shards_restored, done.shards_rewritten, done.rows_encoded) == (0, 1, 9)
    assert verify_cache(Cache(copy)).problems == ()


def test_a_living_writer_is_not_disturbed(copy: Path) -> None:
    with writing(copy), pytest.raises(CacheError, match="is being written by another process"):
        mend(copy)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from palcache.cache import Cache
from tests.care.test_repairs import mend
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
Path.replace, Path.unlink, Path.rename = deadly(Path.replace), deadly(Path.unlink), deadly(Path.rename)
mend(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_repair_killed_anywhere_is_finished_by_the_next(sound: Path, tmp_path: Path) -> None:
    damaged = response_shard(Cache(sound)).relative_to(sound)
    offset = dataset_places(sound / damaged)["emb/pooled"][0]
    keys = text_keys(TABLE.responses)
    for limit in range(0, 40, 3):
        path = tmp_path / f"c{limit}"
        shutil.copytree(sound, path)
        flip_bit(path / damaged, offset)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(limit), str(Path(__file__).parents[2])],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode in {0, -9}, done.stderr
        mend(path)
        assert verify_cache(Cache(path)).problems == ()
        space_id = Cache(path).comparisons("table").spaces[0][1]
        ours, theirs = Cache(path).space(space_id), Cache(sound).space(space_id)
        assert torch.equal(ours.rows(ours.find(keys)), theirs.rows(theirs.find(keys)))
        assert rubbish(path) == []
        if done.returncode == 0:
            return
    pytest.fail("the repair never ran to its end")
