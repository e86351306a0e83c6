"""A flipped bit anywhere in a shard with token states is found by verify and mended by repair."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from palcache.cache import Cache
from palcache.care.repairs import Repair, repair_cache
from palcache.care.verification import verify_cache
from palcache.configs import EmbedConfig, Items, StoredDtype, TokenLevel
from palcache.embedding.encoding import embed_comparisons
from palcache.encoders import Encoder
from palcache.storage.layouts import dataset_places
from tests.state_stubs import StubStateEncoder, as_state_encoder
from tests.stubs import contents, differing, flip_bit, small_table

TABLE = small_table(prompts=5, responses=17)
KINDS: list[tuple[Items, TokenLevel, StoredDtype]] = [
    ("separate", "responses", "float16"),
    ("joint", "responses", "int8"),
    ("joint", "all", "float32"),
]


def config_of(items: Items, tokens: TokenLevel, dtype: StoredDtype) -> EmbedConfig:
    return EmbedConfig(dtype=dtype, items=items, tokens=tokens, shard_rows=9)


def stub() -> Encoder:
    return as_state_encoder(StubStateEncoder())


def no_model() -> Encoder:
    raise AssertionError("the model is not needed")


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sound cache; tests work on copies."""
    path = tmp_path_factory.mktemp("sound") / "c"
    embed_comparisons(TABLE, stub(), Cache.create(path), name="t", config=config_of(*request.param))
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "c")
    return tmp_path / "c"


def token_shard(path: Path, at: int = 1) -> Path:
    """Return a shard that keeps token states."""
    cache = Cache(path)
    (space_id,) = [space_id for space_id in cache.space_ids if "tokens" in cache.spec(space_id)]
    return cache.shard_paths(space_id)[at]


def mend(path: Path, **options: object) -> Repair:
    encoder = as_state_encoder(StubStateEncoder(**options))  # type: ignore[arg-type]
    return repair_cache(Cache(path), lambda: encoder)


def changed(sound: Path, path: Path) -> list[str]:
    """Return the files that differ, locks left aside."""
    return [name for name in differing(contents(sound), contents(path)) if "/." not in name and name[0] != "."]


def places_of(shard: Path) -> dict[str, int]:
    """Return an offset inside every dataset, and in HDF5's own bytes, the gaps and the end."""
    places = {
        name: offset + (int(np.prod(shape)) * dtype.itemsize) // 2
        for name, (offset, dtype, shape) in dataset_places(shard).items()
        if 0 not in shape
    }
    taken = np.zeros(shard.stat().st_size, bool)
    for offset, dtype, shape in dataset_places(shard).values():
        taken[offset : offset + int(np.prod(shape)) * dtype.itemsize] = True
    content = np.frombuffer(shard.read_bytes(), np.uint8)
    own = np.flatnonzero(~taken & (content != 0))  # superblock, object headers, attributes, trees and heaps
    gaps = np.flatnonzero(~taken & (content == 0))
    spread = {f"own-{at}": int(at) for at in own[np.linspace(0, len(own) - 1, 12).astype(int)]}
    return places | spread | {f"gap-{at}": int(at) for at in gaps[np.linspace(0, len(gaps) - 1, 3).astype(int)]}


def test_a_bit_of_every_region_is_found_and_mended(sound: Path, tmp_path: Path) -> None:
    """The mended cache is the sound one, byte for byte."""
    shard = token_shard(sound)
    path = tmp_path / "c"
    shutil.copytree(sound, path)
    for name, offset in places_of(shard).items():
        flip_bit(path / shard.relative_to(sound), offset, offset % 8)
        assert any(shard.name in problem for problem in verify_cache(Cache(path)).problems), name
        done = mend(path)
        assert (done.shards_restored, done.rows_lost) == (1, 0), name
        assert verify_cache(Cache(path)).problems == (), name
        assert changed(sound, path) == [], name


def test_damage_outside_the_rows_needs_no_model(copy: Path, sound: Path) -> None:
    """HDF5's signature, the offsets and the sums follow from the rest."""
    places = dataset_places(token_shard(copy))
    for offset in (3, places["tok/offsets"][0] + 8, places["sum/tok.values"][0], places["sum/tok.offsets"][0]):
        flip_bit(token_shard(copy), offset)
        done = repair_cache(Cache(copy), no_model)
        assert (done.shards_restored, done.rows_encoded) == (1, 0)
        assert changed(sound, copy) == []


def test_a_header_and_a_state_at_once(copy: Path, sound: Path) -> None:
    """HDF5 cannot open the file and a row is wrong too: the rows' token counts say how many states there are."""
    shard = token_shard(copy)
    flip_bit(shard, dataset_places(shard)["tok/values"][0])
    flip_bit(shard, 3)
    done = mend(copy)
    assert (done.shards_restored, done.rows_lost) == (1, 0)
    assert changed(sound, copy) == []


@pytest.mark.parametrize("size", [0, 100, 9_000, 50_000])
def test_a_shard_cut_short_is_mended(copy: Path, size: int) -> None:
    with token_shard(copy).open("r+b") as file:
        file.truncate(size)
    assert mend(copy).rows_lost == 0
    assert verify_cache(Cache(copy)).problems == ()


def test_other_libraries_encode_the_whole_shard_again(copy: Path) -> None:
    shard = token_shard(copy)
    flip_bit(shard, dataset_places(shard)["tok/values"][0])
    done = mend(copy, library="2")
    assert (done.shards_restored, done.shards_rewritten, done.rows_lost) == (0, 1, 0)
    assert verify_cache(Cache(copy)).problems == ()


def test_only_rows_with_damaged_tokens_are_encoded_again(tmp_path: Path) -> None:
    """A block of 4,096 tokens holds some rows of a large shard, and only those are damaged."""
    table = small_table(prompts=3, responses=1_500)
    config = EmbedConfig(tokens="responses", dtype="float32")
    embed_comparisons(table, stub(), Cache.create(tmp_path / "c"), name="t", config=config)
    shard = token_shard(tmp_path / "c", 0)
    (offset, _, shape) = dataset_places(shard)["tok/values"]
    assert 2 * 4_096 < shape[0] < 3 * 4_096
    flip_bit(shard, offset + 4_096 * 4 * shape[1] + 7)  # the second of three blocks
    before = Cache(tmp_path / "c").shard_paths(Cache(tmp_path / "c").space_ids[0])
    log = tmp_path / "log"
    done = mend(tmp_path / "c", log=log)
    assert done.shards_restored == 1
    assert 500 < done.rows_encoded < 900
    assert len(log.read_text().splitlines()) == done.rows_encoded
    assert Cache(tmp_path / "c").shard_paths(Cache(tmp_path / "c").space_ids[0]) == before


def test_sound_rows_without_a_text_are_kept(sound: Path, copy: Path) -> None:
    """The table is gone: what is damaged is lost, states of other shards stay as they were."""
    other = small_table(prompts=3, responses=4, seed=5, label="other")
    config = EmbedConfig(dtype="float16", items="joint", tokens="responses", shard_rows=9)
    embed_comparisons(other, stub(), Cache.create(copy), name="other", config=config)
    space_id = token_shard(sound).parent.parent.name
    Cache(copy).remove_comparisons("t")
    shard = copy / token_shard(sound).relative_to(sound)
    places = dataset_places(shard)
    flip_bit(shard, places["norm"][0])
    done = mend(copy)
    assert (done.rows_lost, done.rows_encoded) == (places["norm"][2][0], 0)
    left, all_ = Cache(copy).space(space_id), Cache(sound).space(space_id)
    keys = np.concatenate([opened.keys for opened in left.shards])
    values, offsets = left.tokens(left.find(keys))
    expected, same = all_.tokens(all_.find(keys))
    assert torch.equal(values, expected)
    assert torch.equal(offsets, same)
