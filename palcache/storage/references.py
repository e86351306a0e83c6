"""Which texts the comparison tables of a cache name, and in which spaces they belong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from palcache.fingerprints import KEY_BYTES, Keys
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.indexes import KeyIndex


@final
@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """Distinct items of a role.

    Attributes:
        texts: texts, or the responses of joint items, (n,).
        keys: their keys, (n, 16).
        prompts: the prompts of joint items, (n,); None for other roles.
    """

    texts: pa.Array
    keys: Keys
    prompts: pa.Array | None = None

    def take(self, rows: npt.NDArray[np.int64]) -> Items:
        """Return some of the items."""
        at = pa.array(rows)
        return Items(self.texts.take(at), self.keys[rows], None if self.prompts is None else self.prompts.take(at))


def wanted_keys(tables: Iterable[StoredComparisons], space_id: str) -> Keys:
    """Return the keys of the distinct items that tables want in a space, in the order of the tables."""
    parts = [_keys(table, role) for table in tables for role in _roles(table, space_id)]
    keys = np.concatenate([*parts, np.empty((0, KEY_BYTES), np.uint8)])
    return keys[np.sort(KeyIndex.build(keys).positions)]


def known_items(tables: Sequence[StoredComparisons], role: str) -> Items:
    """Return the distinct items that tables hold in a role, whichever encoders embedded them; joint ones where any did."""
    parts = [_items(table, role) for table in tables if role != "joint" or table.joint_spaces]
    none = pa.array([], pa.large_string())
    prompts = [part.prompts.cast(pa.large_string()) for part in parts if part.prompts is not None]
    whole = Items(
        pa.concat_arrays([*(part.texts.cast(pa.large_string()) for part in parts), none]),
        np.concatenate([*(part.keys for part in parts), np.empty((0, KEY_BYTES), np.uint8)]),
        pa.concat_arrays([*prompts, none]) if role == "joint" else None,
    )
    return whole.take(np.sort(KeyIndex.build(whole.keys).positions))


def named_spaces(tables: Iterable[StoredComparisons]) -> set[str]:
    """Return the ids of the spaces that tables name."""
    return {space_id for table in tables for spaces in (*table.spaces, table.joint_spaces) for space_id in spaces}


def _roles(table: StoredComparisons, space_id: str) -> list[str]:
    """Return in which roles a table's items are in a space."""
    named = {
        "prompt": {prompt for prompt, _ in table.spaces},
        "response": {response for _, response in table.spaces},
        "joint": set(table.joint_spaces),
    }
    return [role for role, spaces in named.items() if space_id in spaces]


def _keys(table: StoredComparisons, role: str) -> Keys:
    if role == "joint":
        return table.joint_keys
    return table.prompt_keys if role == "prompt" else table.response_keys


def _items(table: StoredComparisons, role: str) -> Items:
    prompts, responses = table.comparisons.prompts.values, table.comparisons.responses
    if role != "joint":
        return Items(prompts if role == "prompt" else responses, _keys(table, role))
    pairs = table.joint_items[0]
    return Items(responses.take(pa.array(pairs[:, 1])), table.joint_keys, prompts.take(pa.array(pairs[:, 0])))
