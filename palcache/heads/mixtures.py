"""User mixtures: each user's weights over the k prototypes, a point of the simplex."""

from __future__ import annotations

import torch


def softmax_mixtures(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return points of the simplex: `softmax(logits / temperature)` over the last axis.

    Args:
        logits: user weights W, (..., u, k).
        temperature: T above 0; small values push users to single prototypes.
    """
    return torch.softmax(logits / temperature, dim=-1)
