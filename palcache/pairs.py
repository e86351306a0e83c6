"""Pairs: which rows of a table ask about the same two responses, and which answers contradict each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from palcache.comparisons import Comparisons

Codes = npt.NDArray[np.int64]


def distinct_rows(*columns: npt.NDArray[Any]) -> Codes:
    """Return a number per row that is equal for rows equal in every column, (n,)."""
    _, codes = np.unique(np.stack([column.astype(np.int64) for column in columns], axis=1), axis=0, return_inverse=True)
    return np.asarray(codes.reshape(-1), np.int64)


def pair_codes(comparisons: Comparisons) -> Codes:
    """Return a number per row that is equal for rows of one prompt with the same two responses in either order, (n,)."""
    left, right = comparisons.response_1, comparisons.response_2
    return distinct_rows(comparisons.prompts.codes, np.minimum(left, right), np.maximum(left, right))


def contradictions(comparisons: Comparisons) -> Codes:
    """Return the rows of users who preferred both responses of one pair at different times."""
    asked = distinct_rows(comparisons.users.codes, pair_codes(comparisons))
    # +1: the response of the larger number is preferred, whichever side it stood on.
    liking = comparisons.y * np.where(comparisons.response_2 > comparisons.response_1, 1, -1)
    size = int(asked.max(initial=-1)) + 1
    up, down = (np.bincount(asked[liking == sign], minlength=size) > 0 for sign in (1, -1))
    return np.flatnonzero((up & down)[asked])
