"""Verification: whatever byte of a cache changes is found and named, and so is another encoder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from palcache.cache import MANIFEST, Cache
from palcache.care.verification import reencode_sample, verify_cache
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import embed_comparisons
from palcache.encoders import Role
from palcache.errors import MismatchError
from palcache.storage.comparison_files import StoredComparisons
from tests.stubs import StubEncoder, contents, flip_bit, small_table

PROMPTS, RESPONSES, SHARD_ROWS = 5, 13, 4


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Return a cache of one table with two prompt shards and four response shards."""
    return filled(tmp_path / "cache", StubEncoder(batch_sensitive=False))


def filled(path: Path, encoder: StubEncoder, **options: Any) -> Cache:
    """Embed the small table into a cache."""
    config = EmbedConfig(shard_rows=SHARD_ROWS, **options)
    table = small_table(PROMPTS, RESPONSES)
    embed_comparisons(table, encoder, Cache.create(path), name="table", config=config)
    return Cache(path)


def shards_of(cache: Cache, role: Role) -> list[Path]:
    """Return the shards of a role, in order."""
    pair = cache.comparisons("table").spaces[0]
    return cache.shard_paths(pair[("prompt", "response").index(role)])


def test_a_sound_cache_has_no_problems(cache: Cache) -> None:
    """Shards, rows and bytes are counted, and nothing is written."""
    before, seen = contents(cache.path), list[int]()
    found = verify_cache(cache, on_shard=seen.append)
    assert (found.shards, found.rows, found.problems) == (6, PROMPTS + RESPONSES, ())
    assert found.nbytes == sum(seen) == sum(path.stat().st_size for path in cache.path.glob("spaces/*/shards/*.h5"))
    assert len(seen) == 6
    assert contents(cache.path) == before


@pytest.mark.parametrize("name", ["emb/pooled", "norm", "key", "n_tokens", "flags"])
def test_a_flipped_bit_is_placed(cache: Cache, name: str) -> None:
    """The file, the dataset and the rows are named, and what to do."""
    path = shards_of(cache, "response")[1]
    with h5py.File(path, "r") as file:
        offset = file[name].id.get_offset()
    flip_bit(path, offset + 1)
    (problem,) = verify_cache(cache).problems
    assert problem == (
        f"{path}: the bytes of {name}, rows 0 to 3, are not those that were written; mend it with palcache "
        "cache verify --repair."
    )


def test_every_bit_counts(cache: Cache) -> None:
    """Flipped bits anywhere in any file of a cache are found, but for locks and what can be derived."""
    random = np.random.default_rng(0)
    for path in sorted(cache.path.rglob("*")):
        if not path.is_file() or path.name in {".lock", ".writers", "index.h5"}:
            continue
        for _ in range(3 if path.suffix == ".h5" and "shards" in str(path) else 1):
            nonzero = np.flatnonzero(np.frombuffer(path.read_bytes(), np.uint8))
            offset = int(random.choice(nonzero))
            if path.suffix != ".h5":
                offset = path.read_bytes().index(b'stub",\n        "identity' if path.name == MANIFEST else b"00000")
            elif path.parent.name == "comparisons":
                offset = path.read_bytes().index(b"ask0")
            flip_bit(path, offset, 0)
            assert verify_cache(Cache(cache.path)).problems, (path.name, offset)
            flip_bit(path, offset, 0)
    assert verify_cache(Cache(cache.path)).problems == ()


def test_every_damaged_shard_is_reported(cache: Cache) -> None:
    """One that cannot be opened hides no other, in its space or elsewhere."""
    first, second, third, _ = shards_of(cache, "response")
    os.truncate(first, 5_000)
    flip_bit(second, 30_000)
    third.write_bytes(b"not HDF5")
    flip_bit(shards_of(cache, "prompt")[0], 40_000)
    found = verify_cache(cache)
    assert len(found.problems) == 4
    for path in (first, second, third, shards_of(cache, "prompt")[0]):
        assert sum(str(path) in problem for problem in found.problems) == 1
    assert found.shards == 6


def test_shards_in_the_wrong_place_are_reported(cache: Cache) -> None:
    """A shard copied into another space, and one that the journal names and nobody has."""
    stray = shutil.copy(shards_of(cache, "response")[3], shards_of(cache, "prompt")[0].parent)
    gone = shards_of(cache, "response")[3]
    gone.unlink()
    problems = verify_cache(cache).problems
    assert any(
        f"The shard {gone.name}" in problem and "is in the journal and not in its folder" in problem
        for problem in problems
    )
    assert any(str(stray) in problem and "belongs to the space" in problem for problem in problems)
    assert any("1 texts of the table table have no vector in the space" in problem for problem in problems)


def test_a_renamed_shard_is_reported(cache: Cache) -> None:
    """The name is the sum of the whole file."""
    path = shards_of(cache, "prompt")[0]
    path.rename(path.with_name("000001-0000000000000000.h5"))
    assert any("the bytes of file, rows 0 to 3, are not those" in problem for problem in verify_cache(cache).problems)


def test_another_spec_in_the_manifest_is_reported(cache: Cache) -> None:
    """A space is named for its spec."""
    manifest = json.loads((cache.path / MANIFEST).read_text())
    space_id = cache.space_ids[0]
    manifest["spaces"][space_id]["spec"]["prefix"] = "search: "
    (cache.path / MANIFEST).write_text(json.dumps(manifest))
    (problem,) = verify_cache(Cache(cache.path)).problems
    assert f"the spec of the space {space_id} is not the one that it was named for" in problem


def test_tables_are_checked(cache: Cache) -> None:
    """Damaged tables, tables of spaces that are gone and tables with texts that nobody encoded are named."""
    other = small_table(PROMPTS, RESPONSES + 2, label="x")
    pair = cache.comparisons("table").spaces[0]
    cache.put_comparisons(StoredComparisons("bare", other, other.fingerprint(), (pair,), {}))
    cache.put_comparisons(StoredComparisons("lost", other, other.fingerprint(), (("ff" * 16, pair[1]),), {}))
    (cache.path / "comparisons" / "broken.h5").write_bytes(b"broken")
    problems = verify_cache(cache).problems
    assert f"{PROMPTS} texts of the table bare have no vector in the space {pair[0]}; embed it again." in problems
    assert f"{RESPONSES + 2} texts of the table bare have no vector in the space {pair[1]}; embed it again." in problems
    assert f"The table lost names the space {'ff' * 16}, which is not there; embed it again." in problems
    assert any("broken.h5 cannot be read as a comparison table" in problem for problem in problems)
    assert len(problems) == 5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_same_encoder_gives_the_stored_vectors(tmp_path: Path, dtype: str) -> None:
    """As many rows per space as were asked for, or all; the lowest cosine tells rounding from another model."""
    encoder = StubEncoder(batch_sensitive=False)
    cache = filled(tmp_path, encoder, dtype=dtype)
    compared, lowest, problems = reencode_sample(cache, encoder, 7)
    assert (compared, problems) == (PROMPTS + 7, ())
    assert lowest > {"float32": 0.999999, "float16": 0.99999, "bfloat16": 0.9999}[dtype]
    assert reencode_sample(cache, encoder, 100)[0] == PROMPTS + RESPONSES
    assert reencode_sample(cache, encoder, 1, seed=1)[0] == 2


def test_vectors_of_another_version_are_noticed(cache: Cache) -> None:
    """An encoder that says it is the same and gives other vectors; each row is named by its key."""

    class Drifted:
        """Gives other vectors in the response role."""

        def __init__(self, stub: StubEncoder) -> None:
            self._stub = stub

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stub, name)

        def encode(self, window: Any, rows: Any, role: Role) -> torch.Tensor:
            vectors = self._stub.encode(window, rows, role)
            return vectors.roll(1, dims=1) if role == "response" else vectors

    compared, lowest, problems = reencode_sample(cache, Drifted(StubEncoder(batch_sensitive=False)), 3)
    assert compared == 6
    assert lowest < 0.99
    assert len(problems) == 3
    assert all("in the response space has cosine" in problem for problem in problems)


def test_a_vector_that_is_not_a_number_is_a_difference(cache: Cache) -> None:
    """A comparison with nothing is not a match."""
    encoder = StubEncoder(
        batch_sensitive=False, nan_on=frozenset(small_table(PROMPTS, RESPONSES).responses.to_pylist())
    )
    _, _, problems = reencode_sample(cache, encoder, 2)
    assert len(problems) == 2


def test_rows_are_encoded_again_in_batches_that_fit(tmp_path: Path) -> None:
    """Within the encoder's budget, and of one length where padding would change the vectors."""
    lengths: list[int] = []

    class Strict:
        """Refuses batches of several lengths or above the budget."""

        def __init__(self, stub: StubEncoder) -> None:
            self._stub = stub

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stub, name)

        def encode(self, window: Any, rows: Any, role: Role) -> torch.Tensor:
            (length,) = set(window.n_tokens[rows].tolist())
            lengths.append(length * len(rows))
            return self._stub.encode(window, rows, role)

    encoder = StubEncoder(batch_sensitive=False, equal_lengths=True, token_budget=18)
    cache = filled(tmp_path, encoder)
    assert reencode_sample(cache, Strict(encoder), 100)[2] == ()
    assert max(lengths) <= 18


def test_another_encoder_is_told_apart(cache: Cache) -> None:
    """The message names the fields that differ."""
    with pytest.raises(
        MismatchError, match=r"written by the encoder other: the nearest differs in identity; name the model"
    ):
        reencode_sample(cache, StubEncoder(identity="other"), 3)
    with pytest.raises(MismatchError, match=r"the nearest differs in compute_dtype, width"):
        reencode_sample(cache, StubEncoder(compute_dtype="bfloat16", width=9), 3)
