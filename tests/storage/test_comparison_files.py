"""A stored table is read as it was written, byte for byte the same each time, or refused."""

from __future__ import annotations

import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.comparisons import OPTIONAL, Column, Comparisons
from palcache.errors import CacheError, StorageError
from palcache.fingerprints import content_key
from palcache.storage.comparison_files import StoredComparisons, read_stored, write_stored

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
    st.sampled_from(
        ["a.b", ".", "..", "nul\x00in the middle", "\x00", "🦔🏽‍🚀", "e\u0301", "é", "x" * 70_000, "a/b", "\r\n"]
    ),
).filter(lambda text: not text.isspace())
SPACES = (("a" * 32, "b" * 32), ("c" * 32, "c" * 32))
ABOUT = {"split": {"by": "pair", "seed": 0}, "note": "nul \x00, dot ., é, 🦔"}


def stored(rows: list[dict[str, Any]], name: str = "table") -> StoredComparisons:
    comparisons = Comparisons.from_rows(rows)
    return StoredComparisons(name, comparisons, comparisons.fingerprint(), SPACES, ABOUT)


def rows_of(n: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"user_id": f"u{i % 3}", "prompt": f"p{i % 5}", "response_1": f"a{i}", "response_2": f"b{i}", "y": 1} | more
        for i in range(n)
    ]


def assert_same(one: Comparisons, other: Comparisons) -> None:
    """The same content in the same order, in the same types."""
    assert one.fingerprint() == other.fingerprint()
    assert one.responses.equals(other.responses)
    for name in ("users", "prompts", *OPTIONAL):
        left: Column | None = getattr(one, name)
        right: Column | None = getattr(other, name)
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            assert left.values.equals(right.values)
            assert left.codes.dtype == right.codes.dtype == np.int32
            assert left.to_list() == right.to_list()
    for name in ("response_1", "response_2", "y"):
        assert getattr(one, name).dtype == getattr(other, name).dtype
        assert np.array_equal(getattr(one, name), getattr(other, name))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS, st.sampled_from([-1, 0, 1])), min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(OPTIONAL), TEXTS),
)
def test_tables_of_any_text_round_trip(values: list[tuple[str, str, str, str, int]], more: dict[str, str]) -> None:
    rows = [
        {"user_id": user, "prompt": prompt, "response_1": left, "response_2": left + right, "y": y, **more}
        for user, prompt, left, right, y in values
    ]
    comparisons = Comparisons.from_rows(rows, ties="half")
    table = StoredComparisons("na.me", comparisons, comparisons.fingerprint(), SPACES, ABOUT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "na.me.h5")
        write_stored(path, table)
        read = read_stored(path)
    assert_same(read.comparisons, comparisons)
    assert (read.name, read.fingerprint, read.spaces, dict(read.about)) == ("na.me", table.fingerprint, SPACES, ABOUT)


def test_sliced_texts_are_stored_without_their_neighbours(tmp_path: Path) -> None:
    """A slice's buffers hold the whole array."""
    comparisons = Comparisons.from_rows(rows_of(3))
    wide = pa.array(["secret", *comparisons.responses.to_pylist(), "hidden"], pa.large_string())
    sliced = replace(comparisons, responses=wide[1:-1])
    write_stored(tmp_path / "table.h5", StoredComparisons("table", sliced, sliced.fingerprint(), (), {}))
    assert_same(read_stored(tmp_path / "table.h5").comparisons, comparisons)
    content = (tmp_path / "table.h5").read_bytes()
    assert b"secret" not in content
    assert b"hidden" not in content


def test_the_same_table_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stored(tmp_path / "one.h5", stored(rows_of(11, split="train")))
    monkeypatch.setattr("os.getpid", lambda: 123_456)  # stands in the temporary name
    write_stored(tmp_path / "two.h5", stored(rows_of(11, split="train")))
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_the_file_holds_texts_once_and_their_keys(tmp_path: Path) -> None:
    """The layout of docs/format.md."""
    table = stored(rows_of(11, split="train"))
    write_stored(tmp_path / "table.h5", table)
    with h5py.File(tmp_path / "table.h5", "r") as file:
        assert file["prompt/bytes"][:].tobytes() == b"p0p1p2p3p4"
        assert file["prompt/offsets"][:].tolist() == [0, 2, 4, 6, 8, 10]
        assert file["prompt/code"][:].tolist() == [i % 5 for i in range(11)]
        assert file["response/offsets"].shape == (23,)
        expected = [content_key("text", [f"p{i}".encode()]) for i in range(5)]
        assert [key.tobytes() for key in file["prompt/key"][:]] == expected
        assert {"emb", "vectors"}.isdisjoint(file)
        assert "group" not in file
    assert [key.tobytes() for key in table.prompt_keys] == expected
    assert table.response_keys.shape == (22, 16)
    assert table.response_keys is table.response_keys


def test_a_failed_write_keeps_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "table.h5"
    write_stored(path, stored(rows_of(2)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(StorageError, match=r"The disk is full while writing .*/table\.h5"):
            write_stored(path, stored(rows_of(5_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(read_stored(path).comparisons, stored(rows_of(2)).comparisons)
    assert [found.name for found in tmp_path.iterdir()] == ["table.h5"]


def test_a_table_on_a_full_disk_never_reaches_hdf5(tmp_path: Path) -> None:
    """HDF5 crashes the process when the disk is full as it closes a file; this would end the test run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, 3_000, 9_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StorageError, match="The disk is full while writing"):
                write_stored(tmp_path / "table.h5", stored(rows_of(11)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CacheError, match=r"none\.h5 cannot be read as a comparison table \(.*No such file.*run palcache embed"
    ):
        read_stored(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(
        CacheError, match=r"text\.h5 cannot be read as a comparison table \(.*\); run palcache embed on it again"
    ):
        read_stored(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(CacheError, match=r"other\.h5 is HDF5 but not a palcache comparison table\.$"):
        read_stored(tmp_path / "other.h5")


def test_another_version_is_refused(tmp_path: Path) -> None:
    write_stored(tmp_path / "table.h5", stored(rows_of(2)))
    with h5py.File(tmp_path / "table.h5", "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(CacheError, match=r"table\.h5 has format version 2; this palcache reads version 1\.$"):
        read_stored(tmp_path / "table.h5")


@pytest.mark.parametrize("name", ["user", "prompt", "response", "y", "response_1", "split/code", "prompt/offsets"])
def test_a_table_that_lacks_a_part_is_refused(tmp_path: Path, name: str) -> None:
    write_stored(tmp_path / "table.h5", stored(rows_of(4, split="train")))
    with h5py.File(tmp_path / "table.h5", "a") as file:
        del file[name]
    with pytest.raises(CacheError, match=r"table\.h5 cannot be read as a comparison table \("):
        read_stored(tmp_path / "table.h5")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("y", -1),
        ("user/code", 2),
        ("user/code", 99),
        ("response_1", -1),
        ("response_2", 10**6),
        ("prompt/bytes", ord("q")),
        ("prompt/bytes", 0xFF),
        ("prompt/offsets", 5),
        ("prompt/offsets", -1),
        ("split/bytes", ord("x")),
    ],
)
def test_a_table_that_is_not_its_fingerprint_is_refused(tmp_path: Path, name: str, value: int) -> None:
    write_stored(tmp_path / "table.h5", stored(rows_of(4, split="train")))
    with h5py.File(tmp_path / "table.h5", "a") as file:
        file[name][1] = value
    with pytest.raises(CacheError, match=r"table\.h5 (is damaged|cannot be read).+; run palcache embed on it again\.$"):
        read_stored(tmp_path / "table.h5")


def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    path, table = tmp_path / "table.h5", stored(rows_of(7, split="train"))
    write_stored(path, table)
    whole, refused = path.read_bytes(), 0
    for at in np.random.default_rng(0).integers(0, len(whole), 200).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            assert_same(read_stored(path).comparisons, table.comparisons)
        except CacheError:
            refused += 1
    assert refused > 20
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match="cannot be read as a comparison table"):
        read_stored(path)
