"""Which texts are encoded together: a plan that depends on the token counts alone, so that a resumed shard repeats it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_ROWS = 1_024


def plan_batches(
    n_tokens: npt.NDArray[np.uint32], budget: int, *, equal_lengths: bool = False
) -> list[npt.NDArray[np.int64]]:
    """Return batches of row numbers, longest texts first, each of at most `budget` padded tokens.

    Texts of one length stand together, so little is padded; starting with the longest finds out at once whether the
    largest batch fits the memory. A text longer than the budget is a batch of its own.

    Args:
        n_tokens: tokens per row, (N,).
        budget: rows times tokens of the longest row, at most.
        equal_lengths: a batch holds texts of one length only, so that nothing is padded.
    """
    order = np.argsort(-n_tokens.astype(np.int64), kind="stable")
    lengths = np.maximum(n_tokens[order].astype(np.int64), 1)
    batches, start = [], 0
    while start < len(order):
        size = int(min(MAX_ROWS, max(1, budget // lengths[start])))
        if equal_lengths:
            size = min(size, int((lengths[start : start + size] == lengths[start]).sum()))
        batches.append(order[start : start + size])
        start += size
    return batches


def padded_tokens(n_tokens: npt.NDArray[np.uint32], batches: list[npt.NDArray[np.int64]]) -> int:
    """Return the tokens that batches compute, padding included."""
    return sum(len(rows) * int(n_tokens[rows].max()) for rows in batches)
