"""Where the two responses of a comparison part: by token ids and real lengths, never by a padding id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache, Space
from palcache.errors import MismatchError
from palcache.storage.comparison_files import StoredComparisons
from palcache.table_spaces import joint_space_of, spaces_of

CHUNK_TOKENS: Final = 1 << 22
"""Tokens compared at once: memory stays flat however many comparisons there are."""
_Rows = npt.NDArray[np.int64]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Positions among the kept tokens of two items, n pairs of them.

    Attributes:
        first: the first position at which the two differ, inclusive, (n,) int64; the shorter one's length where it is the
            beginning of the longer.
        end: the length of the longer, exclusive, (n,) int64.
    """

    first: _Rows
    end: _Rows


def divergence_spans(space: Space, left: _Rows, right: _Rows) -> Spans:
    """Return where pairs of rows part, counted in kept tokens; two equal rows have an empty span.

    Args:
        space: keeps token states.
        left: rows of the first items, (n,).
        right: rows of the second items, (n,).

    Raises:
        CacheError: the space keeps no token states.
    """
    lengths = [space.token_lengths(rows) for rows in (left, right)]
    shared = np.minimum(*lengths)
    first = shared.copy()
    for start, stop in _chunks(shared):
        sides = [space.token_ids(rows[start:stop]) for rows in (left, right)]
        ids, begins = zip(*((ids.numpy(), offsets.numpy()[:-1]) for ids, offsets in sides), strict=True)
        first[start:stop] = _first_difference(ids, begins, shared[start:stop])
    return Spans(first, np.maximum(*lengths))


def ragged_spans(ids: npt.NDArray[Any], offsets: _Rows, left: _Rows, right: _Rows) -> Spans:
    """Return where pairs of rows of ragged token ids part; two equal rows have an empty span.

    Args:
        ids: of all rows, one after the other, (T,).
        offsets: row i is `ids[offsets[i]:offsets[i + 1]]`, (N + 1,) int64.
        left: rows of the first items, (n,).
        right: rows of the second items, (n,).
    """
    lengths = [offsets[rows + 1] - offsets[rows] for rows in (left, right)]
    shared = np.minimum(*lengths)
    first = _first_difference((ids, ids), (offsets[left], offsets[right]), shared)
    return Spans(first, np.maximum(*lengths))


def comparison_spans(
    cache: Cache, stored: StoredComparisons, *, space: str | None = None, joint: bool = False
) -> Spans:
    """Return where the two responses of each comparison part, by the ids of the kept tokens.

    Args:
        cache: the cache.
        stored: a comparison table of it.
        space: which encoder's tokens, where the table has several.
        joint: of the joint items; with `--tokens all` positions count from the prompt's first token, with
            `--tokens responses` from the response's.

    Raises:
        CacheError: the space keeps no token states.
        MismatchError: items of the table are not in the cache.
    """
    if joint:
        opened = cache.space(joint_space_of(stored, space, cache))
        rows, items = opened.find(stored.joint_keys), stored.joint_items[1]
        left, right = rows[items[:, 0]], rows[items[:, 1]]
    else:
        opened = cache.space(spaces_of(stored, space, cache)[1])
        rows = opened.find(stored.response_keys)
        left, right = rows[stored.comparisons.response_1], rows[stored.comparisons.response_2]
    if missing := int((rows < 0).sum()):
        raise MismatchError(
            f"{missing} items of the table {stored.name} have no tokens in {cache.path}; run palcache embed on it again."
        )
    return divergence_spans(opened, left, right)


def _chunks(shared: _Rows) -> Iterator[tuple[int, int]]:
    """Yield runs of pairs that share at most `CHUNK_TOKENS` positions, or a single pair."""
    total, start = np.cumsum(shared), 0
    while start < len(shared):
        before = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + CHUNK_TOKENS, side="right")))
        yield start, stop
        start = stop


def _first_difference(ids: Sequence[npt.NDArray[Any]], begins: Sequence[_Rows], shared: _Rows) -> _Rows:
    """Return the first position below `shared` at which two sides differ, and `shared` where none does, (n,)."""
    starts = np.concatenate([[0], np.cumsum(shared)])
    within = np.arange(int(starts[-1])) - np.repeat(starts[:-1], shared)
    pair = np.repeat(np.arange(len(shared)), shared)
    sides = [own[within + np.repeat(begin, shared)] for own, begin in zip(ids, begins, strict=True)]
    differing = np.flatnonzero(sides[0] != sides[1])
    pairs, at = np.unique(pair[differing], return_index=True)
    first = shared.copy()
    first[pairs] = within[differing[at]]
    return first
