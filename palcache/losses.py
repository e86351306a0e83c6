"""Pairwise losses: pure functions of margins r(response_2) - r(response_1) and labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(margins: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return -log P(y) of each comparison, where P(response_2 preferred) = sigmoid(margin).

    It equals the cross-entropy over the two rewards. A tie (y = 0) counts one half for each side.

    Args:
        margins: (..., n).
        y: -1, 0 or +1, (n,), of the margins' dtype.
    """
    return F.softplus(margins) - margins * (y + 1) / 2
