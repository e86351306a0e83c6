"""`CACHE/comparisons/<name>.h5`: a comparison table with its texts and their keys, and never a vector.

A table names its texts by their content keys and not by row numbers, so that the same file serves every encoder, and
shards can be added, merged and compacted without touching it. It holds the texts themselves: `verify --reencode`,
the length yardstick and reports need them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from palcache.comparisons import OPTIONAL, Column, Comparisons
from palcache.errors import CacheError
from palcache.files import HDF5_BYTES, check_space, write_with
from palcache.fingerprints import Keys, canonical_json, joint_keys, text_keys

FORMAT: Final = "palcache-comparisons"
VERSION: Final = 1


@final
@dataclass(frozen=True, eq=False)
class StoredComparisons:
    """A comparison table of a cache.

    Attributes:
        name: its name in the cache.
        comparisons: the table.
        fingerprint: digest of its meaning.
        spaces: (prompt space id, response space id) of every encoder that has embedded it, sorted.
        about: how it was split and read, as JSON values.
        joint_spaces: space ids of every encoder that has embedded its prompts and responses together, sorted.
    """

    name: str
    comparisons: Comparisons
    fingerprint: str
    spaces: tuple[tuple[str, str], ...]
    about: Mapping[str, Any]
    joint_spaces: tuple[str, ...] = ()

    @functools.cached_property
    def prompt_keys(self) -> Keys:
        """Keys of the distinct prompts, (P, 16)."""
        return text_keys(self.comparisons.prompts.values)

    @functools.cached_property
    def response_keys(self) -> Keys:
        """Keys of the distinct responses, (R, 16)."""
        return text_keys(self.comparisons.responses)

    @functools.cached_property
    def joint_items(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The distinct pairs of a prompt and a response, (m, 2), and each comparison's two items among them, (n, 2)."""
        return self.comparisons.joint_items()

    @functools.cached_property
    def joint_keys(self) -> Keys:
        """Keys of the distinct pairs, (m, 16)."""
        return joint_keys(self.comparisons.prompts.values, self.comparisons.responses, self.joint_items[0])


def write_stored(path: Path, stored: StoredComparisons) -> None:
    """Replace the file at `path` by a table; the same table gives the same bytes.

    Raises:
        StorageError: the disk is full, or `path` cannot be written.
    """
    arrays = _arrays(stored)
    texts = {
        "format": FORMAT.encode(),
        "fingerprint": stored.fingerprint.encode(),
        "spaces": canonical_json(stored.spaces),
        "about": canonical_json(stored.about),
    }
    if stored.joint_spaces:
        texts["joint_spaces"] = canonical_json(stored.joint_spaces)

    def write(temporary: Path) -> None:
        check_space(temporary, HDF5_BYTES + sum(array.nbytes for array in arrays.values()))
        with h5py.File(temporary, "w") as file:
            # Texts of fixed length: damage among those of variable length crashes the HDF5 library.
            file.attrs.update({name: np.bytes_(text) for name, text in texts.items()}, version=VERSION)
            for name, array in arrays.items():
                file[name] = array

    write_with(path, write)


def read_stored(path: Path) -> StoredComparisons:
    """Read a table.

    Raises:
        CacheError: the file is damaged, of another format or version, or its content does not match its fingerprint.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT.encode():
                raise CacheError(f"{path} is HDF5 but not a palcache comparison table.")
            if int(file.attrs["version"]) != VERSION:
                raise CacheError(
                    f"{path} has format version {int(file.attrs['version'])}; this palcache reads version {VERSION}."
                )
            optional = {name: _read_column(file, name) for name in OPTIONAL if name in file}
            comparisons = Comparisons(
                users=_read_column(file, "user"),
                prompts=_read_column(file, "prompt"),
                responses=_read_texts(file, "response"),
                response_1=file["response_1"][:],
                response_2=file["response_2"][:],
                y=file["y"][:],
                **optional,
            )
            fingerprint = file.attrs["fingerprint"].decode()
            spaces = tuple((prompt, response) for prompt, response in json.loads(file.attrs["spaces"]))
            about = json.loads(file.attrs["about"])
            joint_spaces = tuple(json.loads(file.attrs.get("joint_spaces", "[]")))
        found = comparisons.fingerprint()
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CacheError(
            f"{path} cannot be read as a comparison table ({error}); run palcache embed on it again."
        ) from error
    if found != fingerprint:
        raise CacheError(
            f"{path} is damaged: its content does not match its fingerprint; run palcache embed on it again."
        )
    return StoredComparisons(path.stem, comparisons, fingerprint, spaces, about, joint_spaces)


def _arrays(stored: StoredComparisons) -> dict[str, npt.NDArray[Any]]:
    """Return the datasets of a table by name."""
    table = stored.comparisons
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, column in {"user": table.users, "prompt": table.prompts, **table.optional()}.items():
        arrays |= {**_texts(name, column.values), f"{name}/code": column.codes}
    return arrays | {
        **_texts("response", table.responses),
        "response_1": table.response_1,
        "response_2": table.response_2,
        "y": table.y,
        "prompt/key": stored.prompt_keys,
        "response/key": stored.response_keys,
    }


def _texts(name: str, texts: pa.Array) -> dict[str, npt.NDArray[Any]]:
    """Return texts as one run of UTF-8 bytes and their offsets, (m + 1,)."""
    _, offsets, data = texts.buffers()
    at = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return {f"{name}/bytes": np.frombuffer(data, np.uint8)[at[0] : at[-1]], f"{name}/offsets": at - at[0]}


def _read_column(file: Any, name: str) -> Column:
    return Column(_read_texts(file, name), file[f"{name}/code"][:])


def _read_texts(file: Any, name: str) -> pa.Array:
    offsets, data = file[f"{name}/offsets"][:], file[f"{name}/bytes"][:]
    array = pa.Array.from_buffers(
        pa.large_string(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )
    array.validate(full=True)
    return array
