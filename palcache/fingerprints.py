"""The only definition of "the same": the same encoder, the same text, the same table.

Keys are 128-bit BLAKE2b digests of length-prefixed fields, so ``["a-b", "c"]`` and ``["a", "b-c"]`` never meet.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

KEY_BYTES = 16
Keys = npt.NDArray[np.uint8]
"""Row keys, shape (n, 16)."""
UInt64 = npt.NDArray[np.uint64]


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return 32 hexadecimal digits that identify a JSON value."""
    return hashlib.blake2b(canonical_json(value), digest_size=KEY_BYTES).hexdigest()


def content_key(kind: str, fields: Sequence[bytes]) -> bytes:
    """Return the 16-byte key of an item: its kind (`text`, `joint`, `image`) and its length-prefixed fields."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for field in (kind.encode(), *fields):
        state.update(struct.pack("<Q", len(field)))
        state.update(field)
    return state.digest()


def text_keys(texts: pa.Array) -> Keys:
    """Return the keys of texts, shape (n, 16); equal to `content_key("text", [text.encode()])` row by row.

    Args:
        texts: a `large_string` array without nulls; its buffers are hashed in place, no Python string is made.
    """
    texts = texts.cast(pa.large_string())
    if not len(texts):
        return np.empty((0, KEY_BYTES), np.uint8)
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
    data = memoryview(data_buffer)
    kind = hashlib.blake2b(struct.pack("<Q", 4) + b"text", digest_size=KEY_BYTES)
    out = bytearray(len(texts) * KEY_BYTES)
    pack, at = struct.Struct("<Q").pack, 0
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        state = kind.copy()
        state.update(pack(end - start))
        state.update(data[start:end])
        out[at : at + KEY_BYTES] = state.digest()
        at += KEY_BYTES
    return np.frombuffer(out, np.uint8).reshape(-1, KEY_BYTES)


def joint_keys(prompts: pa.Array, responses: pa.Array, pairs: npt.NDArray[np.int64]) -> Keys:
    """Return the keys of joint items, (m, 16); `content_key("joint", [prompt, response])` row by row.

    Args:
        prompts: distinct prompts, a `large_string` array.
        responses: distinct responses.
        pairs: rows of a prompt and of a response, (m, 2).
    """
    first: list[bytes] = prompts.cast(pa.large_binary()).to_pylist()
    second: list[bytes] = responses.cast(pa.large_binary()).to_pylist()
    keys = (content_key("joint", (first[prompt], second[response])) for prompt, response in pairs.tolist())
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as model hubs print it for weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, patterns: Iterable[str]) -> str:
    """Return a digest of the files in a folder that match the glob patterns: their relative names and bytes."""
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    return digest([[path.relative_to(folder).as_posix(), file_digest(path)] for path in paths])


def arrays_digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return a digest of named arrays: names, types, shapes and bytes, in sorted order of the names."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        head = canonical_json([name, array.dtype.str, list(array.shape)])
        state.update(struct.pack("<Q", len(head)))
        state.update(head)
        state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def hex_key(key: npt.NDArray[np.uint8]) -> str:
    """Return a row key as hexadecimal text."""
    return key.tobytes().hex()


def well_mixed(x: UInt64) -> UInt64:
    """Return the splitmix64 finaliser of x (Steele, Lea and Flood, OOPSLA 2014): every input bit moves every output."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
