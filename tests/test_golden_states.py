"""The golden cache of hidden states is read for ever: token states, joint items, int8, and what takes care of them."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from palcache.cache import VERSION, Cache, Space
from palcache.care.compactions import compact_cache
from palcache.care.exports import export_cache
from palcache.care.merges import merge_caches
from palcache.care.repairs import repair_cache
from palcache.care.verification import verify_cache
from palcache.embedding.encoding import embed_comparisons
from palcache.storage.layouts import dataset_places
from tests.golden.make_golden import golden_table
from tests.golden.make_golden_states import CONFIGS, golden_states
from tests.stubs import contents, differing, flip_bit

ARCHIVES = sorted((Path(__file__).parent / "golden").glob("states-v*.tar.xz"))
WITHIN = {"int8": 1e-2, "float16": 1e-3, "bfloat16": 1e-2}


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a golden cache, unpacked."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path / "c", filter="data")
    return tmp_path / "c"


def spaces_of(path: Path, name: str) -> list[Space]:
    cache = Cache(path)
    return [cache.space(s) for s in cache.space_ids if cache.spec(s)["identity"] == f"golden-{name}"]


def test_this_version_has_a_golden_cache() -> None:
    assert f"states-v{VERSION}.tar.xz" in {path.name for path in ARCHIVES}
    assert all(path.stat().st_size < 15_000 for path in ARCHIVES)


def test_it_is_sound_and_reading_changes_nothing(golden: Path) -> None:
    before = contents(golden)
    assert verify_cache(Cache(golden)).problems == ()
    assert differing(before, contents(golden)) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_states_are_those_that_were_stored(golden: Path, name: str) -> None:
    """Pooled vectors, token states, ids and states at the prompt's end, of the right tokens and within rounding."""
    encoder, stored = golden_states(name), Cache(golden).comparisons()
    prompts, responses = (
        column.to_pylist() for column in (stored.comparisons.prompts.values, stored.comparisons.responses)
    )
    for space in spaces_of(golden, name):
        if space.role == "joint":
            pairs = stored.joint_items[0].tolist()
            window = encoder.tokenize_pairs([prompts[a] for a, _ in pairs], [responses[b] for _, b in pairs])
            rows = space.find(stored.joint_keys)
        else:
            window = encoder.tokenize(responses if space.role == "response" else prompts, "response")
            rows = space.find(stored.response_keys if space.role == "response" else stored.prompt_keys)
        expected = [encoder.states(text, space.role) for text in window.texts]  # type: ignore[arg-type]
        within = WITHIN[space.dtype]
        torch.testing.assert_close(
            space.rows(rows).float(), torch.stack([s[-1] for s in expected]), atol=within, rtol=0
        )
        if space.role == "joint":
            assert window.prompt_tokens is not None
            ends = torch.stack([s[int(n) - 1] for s, n in zip(expected, window.prompt_tokens, strict=True)])
            torch.testing.assert_close(space.rows(rows, which="prompt").float(), ends, atol=within, rtol=0)
        if "tokens" not in space.spec:
            continue
        first = window.first_kept(space.spec["tokens"])
        kept = torch.cat([s[int(at) :] for s, at in zip(expected, first, strict=True)])
        torch.testing.assert_close(space.tokens(rows)[0].float(), kept, atol=within, rtol=0)
        ids = [
            window.features["input_ids"][window.offsets[row] + at : window.offsets[row + 1]].tolist()
            for row, at in enumerate(first)
        ]
        assert space.token_ids(rows)[0].tolist() == [one for row in ids for one in row]


def test_it_grows_and_is_cared_for(golden: Path, tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        cache = Cache.create(golden)
        again = embed_comparisons(golden_table(), golden_states(name), cache, name="again", config=config)
        assert again.encoded == 0
    assert sum(one.tokens for one in export_cache(Cache(golden), tmp_path / "out")) > 0
    rows = sum(len(space) for name in CONFIGS for space in spaces_of(golden, name))
    assert merge_caches([Cache(golden)], tmp_path / "merged").rows_added == rows
    assert compact_cache(Cache(golden)).rows_dropped == 0
    assert verify_cache(Cache(golden)).problems == ()


def test_a_damaged_row_is_mended(golden: Path, tmp_path: Path) -> None:
    """Its states are again what they were, whatever versions laid the shard out."""
    sound = tmp_path / "sound"
    shutil.copytree(golden, sound)
    (space,) = spaces_of(golden, "joint-int8")
    shard = space.shards[0].path
    flip_bit(shard, dataset_places(shard)["tok/ids"][0])
    done = repair_cache(Cache(golden), lambda: golden_states("joint-int8"))
    assert done.rows_lost == 0
    assert verify_cache(Cache(golden)).problems == ()
    keys = Cache(golden).comparisons().joint_keys
    ours, theirs = spaces_of(golden, "joint-int8")[0], spaces_of(sound, "joint-int8")[0]
    assert torch.equal(ours.tokens(ours.find(keys))[0], theirs.tokens(theirs.find(keys))[0])
