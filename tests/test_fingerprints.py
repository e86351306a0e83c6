"""Keys and digests: equal for the same content, different for any other, and the same for ever."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.fingerprints import (
    KEY_BYTES,
    arrays_digest,
    canonical_json,
    content_key,
    digest,
    file_digest,
    folder_digest,
    hex_key,
    text_keys,
)

FIELDS = st.lists(st.binary(max_size=9), max_size=4)


def test_content_key_is_blake2b_of_length_prefixed_fields() -> None:
    """The definition, written out by hand: caches on disk depend on it."""
    message = b"\x04" + bytes(7) + b"text" + b"\x02" + bytes(7) + b"hi" + bytes(8)
    assert content_key("text", [b"hi", b""]) == hashlib.blake2b(message, digest_size=16).digest()
    assert content_key("text", [b"palcache"]).hex() == "881ada7cd1d600c32bed84993759e181"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([b"a-b", b"c"], [b"a", b"b-c"]),
        ([b"ab", b"c"], [b"a", b"bc"]),
        ([b"ab"], [b"a", b"b"]),
        ([b""], []),
        ([b"", b"x"], [b"x", b""]),
        ([b"x\x00"], [b"x"]),
    ],
)
def test_fields_are_never_ambiguous(one: list[bytes], other: list[bytes]) -> None:
    assert content_key("text", one) != content_key("text", other)


def test_kinds_do_not_meet() -> None:
    kinds = [content_key(kind, [b"same"]) for kind in ("text", "joint", "image")]
    assert len(set(kinds)) == 3
    assert content_key("te", [b"xt"]) != content_key("text", [])


@settings(deadline=None, max_examples=60)
@given(FIELDS, FIELDS)
def test_content_key_is_injective(one: list[bytes], other: list[bytes]) -> None:
    assert (content_key("text", one) == content_key("text", other)) == (one == other)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=12), max_size=9), st.integers(0, 5), st.booleans())
def test_text_keys_are_content_keys_row_by_row(texts: list[str], skipped: int, large: bool) -> None:
    """Slices share their buffers with the whole array, so offsets must be honoured."""
    array = pa.array(texts, pa.large_string() if large else pa.string())
    for part in (slice(None), slice(skipped, None), slice(skipped, skipped + 2)):
        keys = text_keys(array[part])
        assert keys.shape == (len(texts[part]), KEY_BYTES)
        assert keys.dtype == np.uint8
        assert [key.tobytes() for key in keys] == [content_key("text", [text.encode()]) for text in texts[part]]


@pytest.mark.parametrize("text", ["x" * 3_000_000, "\x00in\x00the middle\x00", "🦔🏽‍🚀", "ends in space "])
def test_text_keys_of_unusual_texts(text: str) -> None:
    assert text_keys(pa.array(["before", text]))[1].tobytes() == content_key("text", [text.encode()])


def test_text_keys_of_empty_texts() -> None:
    assert [key.tobytes() for key in text_keys(pa.array(["", "", ""]))] == [content_key("text", [b""])] * 3


def test_canonical_json_is_one_text_per_value() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é🦔"}) == '{"a":"é🦔","b":[1,2.5,null]}'.encode()
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_digest_depends_on_the_value_alone() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, [2]]) != digest([[1], 2])
    assert digest({"model": "minilm"}) == "37d6679f0f6f710b16e11116c7b99327"


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1_001
    (tmp_path / "weights").write_bytes(content)
    assert file_digest(tmp_path / "weights") == hashlib.sha256(content).hexdigest()


def test_folder_digest_covers_names_and_bytes_of_matching_files(tmp_path: Path) -> None:
    for name, content in {"a.json": b"1", "sub/b.json": b"2", "notes.txt": b"3", "w.bin": b"4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    first = folder_digest(tmp_path, ["*.json", "*.bin"])
    assert folder_digest(tmp_path, ["*.bin", "*.json", "a.*"]) == first
    (tmp_path / "notes.txt").write_bytes(b"changed")
    assert folder_digest(tmp_path, ["*.json", "*.bin"]) == first
    (tmp_path / "sub/b.json").write_bytes(b"changed")
    second = folder_digest(tmp_path, ["*.json", "*.bin"])
    assert second != first
    (tmp_path / "sub/b.json").rename(tmp_path / "sub/c.json")
    assert folder_digest(tmp_path, ["*.json", "*.bin"]) not in {first, second}


def test_arrays_digest_covers_names_types_shapes_and_bytes() -> None:
    values = np.arange(6, dtype=np.int32)
    versions: list[dict[str, npt.NDArray[Any]]] = [
        {"a": values},
        {"b": values},
        {"a": values.reshape(2, 3)},
        {"a": values.reshape(3, 2)},
        {"a": values.astype(np.uint32)},
        {"a": values.astype(">i4")},
        {"a": values[::-1]},
        {"a": values, "b": values},
        {"a": values[:0]},
        {},
    ]
    assert len({arrays_digest(version) for version in versions}) == len(versions)


def test_arrays_digest_ignores_memory_layout_and_order_of_names() -> None:
    values = np.arange(35.0).reshape(5, 7)
    assert arrays_digest({"a": np.asfortranarray(values)}) == arrays_digest({"a": values})
    assert arrays_digest({"a": values[:, ::2]}) == arrays_digest({"a": values[:, ::2].copy()})
    assert arrays_digest({"a": values, "b": values[0]}) == arrays_digest({"b": values[0], "a": values})


def test_hex_key_is_the_key_in_hexadecimal() -> None:
    key = content_key("text", [b"hi"])
    assert bytes.fromhex(hex_key(np.frombuffer(key, np.uint8))) == key
