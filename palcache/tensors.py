"""From a cache to batches on a device: vectors once, comparisons by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.cache import Cache, Space, spaces_of
from palcache.devices import free_memory, resolve_device
from palcache.errors import MismatchError, NumericsError
from palcache.fingerprints import Keys, hex_key
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.spaces import Which

MEMORY_SHARE: Final = 0.4
"""Vectors go to the device at once if they fill at most this share of its free memory; else they are streamed."""


class Table(Protocol):
    """Rows of float32 vectors, found by their position."""

    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def width(self) -> int:
        """Width of the vectors, d."""

    @property
    def streamed(self) -> bool:
        """Vectors are read batch by batch."""

    @property
    def resident(self) -> torch.Tensor | None:
        """All vectors, (m, d), where they are at hand."""

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return vectors by their position, (n,) -> (n, d) float32."""


@final
class VectorTable:
    """Rows of float32 vectors on a device: resident, or read batch by batch through the memory map.

    Args:
        space: where the vectors are.
        rows: the table's rows in the space, (m,).
        device: where batches are wanted.
        resident: keep all vectors on the device.
        which: of a joint space, the items' vectors or the states at the ends of their prompts.
    """

    def __init__(
        self,
        space: Space,
        rows: npt.NDArray[np.int64],
        device: torch.device,
        *,
        resident: bool,
        which: Which = "pooled",
    ) -> None:
        self.width, self.device, self._which = space.width, device, which
        self._space, self._rows = space, torch.from_numpy(rows)
        self._resident = space.rows(rows, which=which).float().to(device) if resident else None
        if self._resident is not None:
            refuse_non_finite(self._resident, space, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def streamed(self) -> bool:
        """Vectors are read through the memory map, batch by batch."""
        return self._resident is None

    @property
    def resident(self) -> torch.Tensor | None:
        """All vectors, (m, d), where they are on the device."""
        return self._resident

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return vectors by their position in this table, (n,) -> (n, d) float32."""
        if self._resident is not None:
            return torch.index_select(self._resident, 0, index)
        rows = self._rows[index.cpu()]
        vectors = self._space.rows(rows, which=self._which)
        refuse_non_finite(vectors, self._space, rows)
        return vectors.to(self.device).float()


@final
@dataclass(frozen=True, slots=True, eq=False)
class TensorTable:
    """Rows of float32 vectors at hand, (m, d), with the interface of `VectorTable`."""

    vectors: torch.Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Width of the vectors, d."""
        return int(self.vectors.shape[-1])

    @property
    def streamed(self) -> bool:
        """The vectors are in memory."""
        return False

    @property
    def resident(self) -> torch.Tensor:
        """All vectors, (m, d)."""
        return self.vectors

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return vectors by their position in this table, (n,) -> (n, d)."""
        return torch.index_select(self.vectors, 0, index)


def refuse_non_finite(vectors: torch.Tensor, space: Space, rows: torch.Tensor) -> None:
    """Raise NumericsError where a vector is not finite, naming its row in the space.

    Args:
        vectors: (n, d).
        space: where they come from.
        rows: the row of each, (n,).
    """
    good = torch.isfinite(vectors).all(dim=1)
    if not bool(good.all()):
        first = int(rows[int(torch.nonzero(~good)[0])])
        raise NumericsError(
            f"The vector of row {first} in the {space.role} space {space.space_id[:8]} is not finite; run palcache cache "
            "verify on the cache, and embed again with --compute-dtype float32."
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class PairBatch:
    """n comparisons over the distinct vectors that they use; each is one pair of rows, or several (of its tokens).

    Attributes:
        prompts: distinct prompt vectors, (P, d).
        prompt: row of each comparison's prompt, (n,) int64.
        responses: distinct response vectors, (R, d).
        response_1: row of the left response, (n,) int64.
        response_2: row of the right response, (n,) int64.
        user: number of the user, (n,) int64; -1 is a user whom the head does not know.
        y: -1, 0 or +1, (n,) float32.
        prompt_names: of the prompt vectors, (P,) int64, which noise goes by; None counts them.
        response_names: of the response vectors, (R,).
        comparison: where comparisons have several pairs of rows, m in all, of which comparison each is, (m,) int64, every
            one at least once and in order; `response_1` and `response_2` are then (m,), and `prompt` too where each pair
            has a prompt row of its own.
    """

    prompts: torch.Tensor
    prompt: torch.Tensor
    responses: torch.Tensor
    response_1: torch.Tensor
    response_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor
    prompt_names: torch.Tensor | None = None
    response_names: torch.Tensor | None = None
    comparison: torch.Tensor | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class PreferenceData:
    """Comparisons and their vectors on one device.

    Attributes:
        prompts: vectors of the distinct prompts.
        responses: vectors of the distinct responses.
        prompt: row of each comparison's prompt, (n,) int64.
        response_1: row of the left response, (n,).
        response_2: row of the right response, (n,).
        user: number of the user in `users`, (n,); -1 where unknown.
        y: -1, 0 or +1, (n,) float32.
        users: ids of the users.
        joint: response vectors are of prompt and response in one forward; prompts are then not read.
    """

    prompts: Table
    responses: Table
    prompt: torch.Tensor
    response_1: torch.Tensor
    response_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor
    users: tuple[str, ...]
    joint: bool = False

    def __len__(self) -> int:
        return len(self.y)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.y.device

    @property
    def width(self) -> int:
        """Width of the vectors, d."""
        return self.prompts.width

    @property
    def streamed(self) -> bool:
        """Vectors are read through the memory map, batch by batch."""
        return self.prompts.streamed or self.responses.streamed

    def take(self, rows: npt.NDArray[np.int64]) -> PreferenceData:
        """Return some of the comparisons, over the same vectors."""
        at = torch.from_numpy(rows).to(self.device)
        names = ("prompt", "response_1", "response_2", "user", "y")
        return replace(self, **{name: getattr(self, name)[at] for name in names})

    def with_users(self, users: Sequence[str]) -> PreferenceData:
        """Return the same comparisons with users numbered as in `users`; others become -1."""
        number = {user: i for i, user in enumerate(users)}
        table = torch.tensor([number.get(user, -1) for user in self.users] + [-1], device=self.device)
        return replace(self, user=table[self.user], users=tuple(users))

    def batch(self, rows: torch.Tensor) -> PairBatch:
        """Return some comparisons with each distinct vector once.

        Args:
            rows: row numbers on the data's device, (n,).
        """
        prompts, prompt, prompt_names = take_distinct(self.prompts, self.prompt[rows])
        pair = torch.cat([self.response_1[rows], self.response_2[rows]])
        responses, response, response_names = take_distinct(self.responses, pair)
        n = len(rows)
        return PairBatch(
            prompts,
            prompt,
            responses,
            response[:n],
            response[n:],
            self.user[rows],
            self.y[rows],
            prompt_names=prompt_names,
            response_names=response_names,
        )

    def batches(self, size: int) -> Iterator[PairBatch]:
        """Yield all comparisons in order, `size` at a time."""
        for rows in torch.split(torch.arange(len(self), device=self.device), size):
            yield self.batch(rows)


def take_distinct(table: Table, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the vectors at `index`, where each stands among them, and their positions in the table.

    Each is read once where repeats are likely; elsewhere finding them costs more than it saves.
    """
    if len(table) > 8 * len(index):
        return table.take(index), torch.arange(len(index), device=index.device), index
    distinct, inverse = torch.unique(index, return_inverse=True)
    return table.take(distinct), inverse, distinct


def load_preferences(
    cache: Cache, stored: StoredComparisons, *, space: str | None = None, device: str = "auto"
) -> PreferenceData:
    """Return a table's comparisons with their vectors on a device.

    Args:
        cache: the cache.
        stored: a comparison table of it.
        space: which encoder's vectors, where the table has several.
        device: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        MismatchError: texts of the table are not in the cache.
        NumericsError: a vector is not finite; streamed vectors are checked as they are read.
    """
    where = resolve_device(device)
    prompt_id, response_id = spaces_of(stored, space, cache)
    spaces = cache.space(prompt_id), cache.space(response_id)
    rows = [
        find_rows(spaces[0], stored.prompt_keys, "prompts", stored.name, cache),
        find_rows(spaces[1], stored.response_keys, "responses", stored.name, cache),
    ]
    needed = sum(4 * len(r) * s.width for r, s in zip(rows, spaces, strict=True))
    resident = needed <= MEMORY_SHARE * free_memory(where)
    table = stored.comparisons

    def to_device(array: npt.NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(where)

    return PreferenceData(
        prompts=VectorTable(spaces[0], rows[0], where, resident=resident),
        responses=VectorTable(spaces[1], rows[1], where, resident=resident),
        prompt=to_device(table.prompts.codes),
        response_1=to_device(table.response_1),
        response_2=to_device(table.response_2),
        user=to_device(table.users.codes),
        y=torch.from_numpy(table.y.astype(np.float32)).to(where),
        users=tuple(table.users.values.to_pylist()),
    )


def find_rows(space: Space, keys: Keys, what: str, name: str, cache: Cache) -> npt.NDArray[np.int64]:
    """Return the rows of keys in a space, (m,).

    Args:
        space: where to look.
        keys: (m, 16).
        what: the items' name in messages.
        name: of the comparison table.
        cache: that holds both.

    Raises:
        MismatchError: a key is not there.
    """
    rows = space.find(keys)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise MismatchError(
            f"{len(missing)} of {len(rows)} {what} of the table {name} have no vector in {cache.path} (the first has the "
            f"key {hex_key(keys[missing[0]])}); run palcache embed on the table again, and see failed.jsonl there."
        )
    return rows
