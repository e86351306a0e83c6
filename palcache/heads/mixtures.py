"""User mixtures: each user's weights over the k prototypes, a point of the simplex."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from palcache.choices import Mixture
from palcache.noises import RowNoise


def softmax_mixtures(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return points of the simplex: `softmax(logits / temperature)` over the last axis.

    Args:
        logits: user weights W, (..., u, k).
        temperature: T above 0; small values push users to single prototypes.
    """
    return torch.softmax(logits / temperature, dim=-1)


def mix(
    kind: Mixture,
    logits: torch.Tensor,
    temperature: float,
    *,
    training: bool = False,
    noise: RowNoise | None = None,
) -> torch.Tensor:
    """Return points of the simplex, (..., k).

    `softmax` is the same in training and evaluation. `partition` is a softmax in training and the largest weight alone
    in evaluation. `gumbel` and `gumbel_hard` draw from the Gumbel-softmax in training (Jang et al., ICLR 2017; hard
    draws pass their gradient straight through); in evaluation they are the softmax and the largest weight alone, where
    the published implementation goes on drawing.

    Args:
        kind: which.
        logits: user weights W, (..., k).
        temperature: T above 0.
        training: a training pass.
        noise: Gumbel noise of the rows of W, (u, k); without it there is none.
    """
    soft = softmax_mixtures(logits, temperature)
    if kind == "softmax" or (kind == "partition" and training):
        return soft
    if kind == "partition" or not training:
        return soft if kind == "gumbel" else _largest(logits)
    if noise is not None:
        soft = softmax_mixtures(logits + noise.gumbel(logits.shape[-1]).to(logits.dtype), temperature)
    return soft if kind == "gumbel" else _largest(soft) - soft.detach() + soft


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Return 1 for the largest value (the first of equals) and 0 elsewhere, (..., k)."""
    return F.one_hot(values.argmax(-1), values.shape[-1]).to(values.dtype)
