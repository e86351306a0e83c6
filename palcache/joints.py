"""From a cache to batches on a device, for items that are a prompt and a response read together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from palcache.cache import Cache
from palcache.devices import free_memory, resolve_device
from palcache.storage.comparison_files import StoredComparisons
from palcache.table_spaces import find_rows, joint_space_of
from palcache.tensors import MEMORY_SHARE, ComparisonData, PreferenceData, on_device
from palcache.vector_tables import VectorTable


@final
@dataclass(frozen=True, slots=True, eq=False)
class JointBatch:
    """n comparisons over the distinct items that they use.

    Attributes:
        items: distinct item vectors, (m, d).
        prompts: on causal models, the states at the ends of the items' prompts, (m, d); else None.
        item_1: row of the left item, (n,) int64.
        item_2: row of the right item, (n,) int64.
        user: number of the user, (n,) int64; -1 is a user whom the head does not know.
        y: -1, 0 or +1, (n,) float32.
    """

    items: torch.Tensor
    prompts: torch.Tensor | None
    item_1: torch.Tensor
    item_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class JointData(ComparisonData[JointBatch]):
    """Comparisons and the vectors of their joint items on one device.

    Attributes:
        items: vectors of the distinct pairs of a prompt and a response.
        prompts: on causal models, the states at the ends of these pairs' prompts, row by row; else None.
        item_1: row of the left item, (n,) int64.
        item_2: row of the right item, (n,).
        user: number of the user in `users`, (n,); -1 where unknown.
        y: -1, 0 or +1, (n,) float32.
        users: ids of the users.
    """

    items: VectorTable
    prompts: VectorTable | None
    item_1: torch.Tensor
    item_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor
    users: tuple[str, ...]

    @property
    def width(self) -> int:
        """Width of the vectors, d."""
        return self.items.width

    @property
    def streamed(self) -> bool:
        """Vectors are read through the memory map, batch by batch."""
        return self.items.streamed

    def vector_bytes(self, n: int) -> int:
        """Return the bytes that the vectors of n comparisons take in memory, at most."""
        return min(2 * n, len(self.items)) * self.items.row_bytes * (1 if self.prompts is None else 2)

    def batch(self, rows: torch.Tensor) -> JointBatch:
        """Return some comparisons with each distinct item once.

        Args:
            rows: row numbers on the data's device, (n,).
        """
        both = torch.cat([self.item_1[rows], self.item_2[rows]])
        distinct, inverse = torch.unique(both, return_inverse=True)
        prompts = None if self.prompts is None else self.prompts.take(distinct)
        n = len(rows)
        items = self.items.take(distinct)
        return JointBatch(items, prompts, inverse[:n], inverse[n:], self.user[rows], self.y[rows])


def load_joint(
    cache: Cache, stored: StoredComparisons, *, space: str | None = None, device: str = "auto", prompts: bool = True
) -> JointData:
    """Return a table's comparisons with the vectors of its joint items on a device.

    Args:
        cache: the cache.
        stored: a comparison table of it, embedded with `--items joint`.
        space: which encoder's vectors, where the table has several.
        device: `auto`, `cpu`, `cuda`, `mps`.
        prompts: read the states at the ends of the prompts too, where there are any.

    Raises:
        InputError: the table is not embedded jointly, or by several encoders.
        MismatchError: items of the table are not in the cache.
        NumericsError: a vector is not finite; streamed vectors are checked as they are read.
    """
    where = resolve_device(device)
    opened = cache.space(joint_space_of(stored, space, cache))
    rows = find_rows(opened, stored.joint_keys, "pairs of a prompt and a response", stored.name, cache)
    prompt_state = prompts and bool(opened.spec.get("prompt_state"))
    resident = 4 * len(rows) * opened.width * (1 + prompt_state) <= MEMORY_SHARE * free_memory(where)
    table, items = stored.comparisons, stored.joint_items[1]
    return JointData(
        items=VectorTable(opened, rows, where, resident=resident),
        prompts=VectorTable(opened, rows, where, resident=resident, which="prompt") if prompt_state else None,
        item_1=on_device(items[:, 0], where),
        item_2=on_device(items[:, 1], where),
        user=on_device(table.users.codes, where),
        y=torch.from_numpy(table.y.astype(np.float32)).to(where),
        users=tuple(table.users.values.to_pylist()),
    )


def load_joint_preferences(
    cache: Cache, stored: StoredComparisons, *, space: str | None = None, device: str = "auto"
) -> PreferenceData:
    """Return a table's joint items as responses of `PreferenceData`, which PAL-A is trained on; arguments as above."""
    data = load_joint(cache, stored, space=space, device=device, prompts=False)
    return PreferenceData(
        prompts=data.items,
        responses=data.items,
        prompt=torch.zeros_like(data.item_1),
        response_1=data.item_1,
        response_2=data.item_2,
        user=data.user,
        y=data.y,
        users=data.users,
        joint=True,
    )
