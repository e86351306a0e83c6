"""A key index answers as a dictionary does, and is read only where it is whole and up to date."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.errors import StorageError
from palcache.fingerprints import KEY_BYTES, Keys
from palcache.storage.indexes import KeyIndex

HALVES = st.sampled_from([bytes(8), b"\xff" * 8, b"\x01" + bytes(7), bytes(7) + b"\x01", b"A shared"])
KEYS = st.lists(st.tuples(HALVES, HALVES | st.binary(min_size=8, max_size=8)).map(b"".join), max_size=12)
STAMP: list[Any] = ["0001-a.h5", "0002-b.h5"]


def array(keys: list[bytes]) -> Keys:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def random_keys(n: int, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (n, KEY_BYTES), np.uint8)


@settings(deadline=None, max_examples=200)
@given(KEYS, KEYS)
def test_find_answers_as_a_dictionary(keys: list[bytes], others: list[bytes]) -> None:
    """Of equal keys the first counts; keys that share one half, or all bits of it, are told apart."""
    index = KeyIndex.build(array(keys))
    first: dict[bytes, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    assert len(index) == len(first)
    asked = [*others, *keys]
    assert index.find(array(asked)).tolist() == [first.get(key, -1) for key in asked]


def test_a_large_index_finds_every_key_and_no_other() -> None:
    keys, others = random_keys(50_021), random_keys(1_009, seed=1)
    keys[40_000:] = keys[:10_021]
    index = KeyIndex.build(keys)
    assert len(index) == 40_000
    order = np.random.default_rng(2).permutation(len(keys))
    assert np.array_equal(index.find(keys[order]), np.where(order < 40_000, order, order - 40_000))
    assert (index.find(others) == -1).all()


def test_many_keys_with_one_first_half() -> None:
    keys = random_keys(301)
    keys[:, :8] = 7
    keys[200:] = keys[100:201]
    first = {key.tobytes(): i for i, key in reversed(list(enumerate(keys)))}
    assert KeyIndex.build(keys).find(keys).tolist() == [first[key.tobytes()] for key in keys]


def test_an_empty_index_finds_nothing() -> None:
    index = KeyIndex.build(random_keys(0))
    assert len(index) == 0
    assert index.find(random_keys(3)).tolist() == [-1, -1, -1]
    assert KeyIndex.build(random_keys(3)).find(random_keys(0)).shape == (0,)


def test_keys_need_not_lie_together_in_memory() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (7, 2 * KEY_BYTES), np.uint8)
    index = KeyIndex.build(wide[::2, ::2])
    assert index.find(wide[:, ::2]).tolist() == [0, -1, 1, -1, 2, -1, 3]


@pytest.mark.parametrize("n", [0, 1, 1_003])
def test_an_index_is_read_as_it_was_written(tmp_path: Path, n: int) -> None:
    keys = random_keys(n)
    index = KeyIndex.build(keys)
    index.save(tmp_path / "index.h5", STAMP)
    read = KeyIndex.load(tmp_path / "index.h5", STAMP)
    assert read is not None
    for name in ("high", "low", "positions"):
        one, other = getattr(read, name), getattr(index, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert read.find(keys).tolist() == list(range(n))


def test_an_index_of_other_shards_is_not_read(tmp_path: Path) -> None:
    KeyIndex.build(random_keys(5)).save(tmp_path / "index.h5", STAMP)
    for stamp in (STAMP[:1], STAMP[::-1], [], None):
        assert KeyIndex.load(tmp_path / "index.h5", stamp) is None


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    """HDF5 itself would crash the process."""
    KeyIndex.build(random_keys(5)).save(tmp_path / "index.h5", STAMP)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(StorageError, match=r"The disk is full while writing .*/index\.h5"):
            KeyIndex.build(random_keys(5_000)).save(tmp_path / "index.h5", STAMP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["index.h5"]
    assert KeyIndex.load(tmp_path / "index.h5", STAMP) is not None


def test_a_stamp_may_be_long(tmp_path: Path) -> None:
    """HDF5 refuses attributes of 64 KiB; a cache of 5,000 shards has a longer list of them."""
    stamp = [f"{i:06d}-0123456789abcdef.h5" for i in range(5_000)]
    KeyIndex.build(random_keys(5)).save(tmp_path / "index.h5", stamp)
    assert KeyIndex.load(tmp_path / "index.h5", stamp) is not None
    assert KeyIndex.load(tmp_path / "index.h5", stamp[:-1]) is None


def test_a_missing_or_foreign_file_is_not_read(tmp_path: Path) -> None:
    assert KeyIndex.load(tmp_path / "index.h5", STAMP) is None
    (tmp_path / "index.h5").write_bytes(b"no HDF5")
    assert KeyIndex.load(tmp_path / "index.h5", STAMP) is None
    with h5py.File(tmp_path / "index.h5", "w") as file:
        file.attrs["stamp"] = 3
    assert KeyIndex.load(tmp_path / "index.h5", STAMP) is None
    assert KeyIndex.load(tmp_path, STAMP) is None


def test_a_damaged_index_is_not_read(tmp_path: Path) -> None:
    """A wrong position would hand out another text's vector."""
    path, keys = tmp_path / "index.h5", random_keys(97)
    KeyIndex.build(keys).save(path, STAMP)
    whole = path.read_bytes()
    assert len(whole) > 97 * 24
    refused = 0
    for at in np.random.default_rng(0).integers(0, len(whole), 150).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        index = KeyIndex.load(path, STAMP)
        refused += index is None
        assert index is None or index.find(keys).tolist() == list(range(97))
    assert refused > 50
    path.write_bytes(whole[: len(whole) // 2])
    assert KeyIndex.load(path, STAMP) is None
