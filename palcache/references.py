"""Which texts the comparison tables of a cache name, and in which spaces they belong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from palcache.comparison_files import StoredComparisons
from palcache.fingerprints import KEY_BYTES, Keys
from palcache.indexes import KeyIndex

Texts = tuple[pa.Array, Keys]
"""Distinct texts and their keys, (n,) and (n, 16)."""


def wanted_texts(tables: Iterable[StoredComparisons], space_id: str) -> Texts:
    """Return the distinct texts that tables want in a space, in the order of the tables."""
    return _distinct([_side(table, place) for table in tables for place in _places(table, space_id)])


def known_texts(tables: Sequence[StoredComparisons], role: str) -> Texts:
    """Return the distinct texts that tables hold in a role, whichever encoders embedded them."""
    return _distinct([_side(table, 0 if role == "prompt" else 1) for table in tables])


def named_spaces(tables: Iterable[StoredComparisons]) -> set[str]:
    """Return the ids of the spaces that tables name."""
    return {space_id for table in tables for pair in table.spaces for space_id in pair}


def _places(table: StoredComparisons, space_id: str) -> list[int]:
    """Return at which places of a table's tuples of spaces one stands: 0 prompts, 1 responses."""
    return sorted({place for spaces in table.spaces for place, named in enumerate(spaces) if named == space_id})


def _side(table: StoredComparisons, place: int) -> Texts:
    if place == 0:
        return table.comparisons.prompts.values, table.prompt_keys
    return table.comparisons.responses, table.response_keys


def _distinct(parts: Sequence[Texts]) -> Texts:
    texts = pa.concat_arrays([*(part.cast(pa.large_string()) for part, _ in parts), pa.array([], pa.large_string())])
    keys = np.concatenate([*(part for _, part in parts), np.empty((0, KEY_BYTES), np.uint8)])
    first = np.sort(KeyIndex.build(keys).positions)
    return texts.take(pa.array(first)), keys[first]
