"""Every golden cache is read for ever: rows, tables, verify, and what takes care of them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from palcache.cache import VERSION, Cache
from palcache.care.compactions import compact_cache
from palcache.care.exports import export_cache
from palcache.care.merges import merge_caches
from palcache.care.verification import verify_cache
from palcache.configs import EmbedConfig, StoredDtype
from palcache.embedding.encoding import embed_comparisons
from palcache.encoders import Role
from palcache.fingerprints import text_keys
from palcache.storage.numerics import to_stored
from tests.golden.make_golden import DTYPES, golden_encoder, golden_table
from tests.stubs import contents, differing, texts_of

ARCHIVES = sorted((Path(__file__).parent / "golden").glob("v*.tar.xz"))
GOLDEN_KEY = "golden"


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a golden cache, unpacked."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path / "c", filter="data")
    return tmp_path / "c"


def test_this_version_has_a_golden_cache() -> None:
    assert f"v{VERSION}.tar.xz" in {path.name for path in ARCHIVES}
    assert all(path.stat().st_size < 10_000 for path in ARCHIVES)


def test_a_golden_cache_is_sound_and_reading_changes_nothing(golden: Path) -> None:
    before = contents(golden)
    found = verify_cache(Cache(golden))
    assert found.problems == ()
    assert found.rows == 3 * (2 + 5)
    assert differing(before, contents(golden)) == []


def test_the_table_says_what_was_said(golden: Path) -> None:
    stored = Cache(golden).comparisons()
    table = golden_table()
    assert stored.fingerprint == table.fingerprint()
    assert stored.comparisons.users.to_list() == ["ann", "ann", "böb", "böb", "cat"]
    assert stored.comparisons.split is not None
    assert stored.comparisons.split.to_list() == ["train", "train", "val", "test", "test"]
    assert len(stored.spaces) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ["prompt", "response"])
def test_vectors_are_those_that_were_stored(golden: Path, dtype: StoredDtype, role: Role) -> None:
    cache, table = Cache(golden), golden_table()
    (space_id,) = [
        space_id
        for space_id in cache.space_ids
        if (cache.spec(space_id)["role"], cache.spec(space_id)["dtype"]) == (role, dtype)
    ]
    space, texts = cache.space(space_id), texts_of(table, role)
    rows = space.find(text_keys(table.prompts.values if role == "prompt" else table.responses))
    fresh = torch.from_numpy(np.stack([golden_encoder(dtype).vector(text, role) for text in texts]))
    stored = to_stored(fresh, dtype)
    bits = stored.values
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else bits
    assert torch.equal(space.rows(rows), torch.as_tensor(expected))
    assert np.array_equal(space.norms()[rows], stored.norms)


def test_a_golden_cache_grows_and_is_cared_for(golden: Path, tmp_path: Path) -> None:
    for dtype in DTYPES:
        config = EmbedConfig(dtype=dtype, shard_rows=4)
        done = embed_comparisons(
            golden_table(), golden_encoder(dtype), Cache.create(golden), name="again", config=config
        )
        assert (done.encoded, done.hits) == (0, 7)
    assert export_cache(Cache(golden), tmp_path / "out")[0].rows
    assert merge_caches([Cache(golden)], tmp_path / "merged").rows_added == 21
    assert compact_cache(Cache(golden)).rows_dropped == 0
    assert verify_cache(Cache(golden)).problems == ()
