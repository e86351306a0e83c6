"""Pairwise losses: pure functions of margins r(response_2) - r(response_1) and labels, in nats where they are likelihoods.

Token losses apply a loss at every token of a span and weigh the positions.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F

from palcache.choices import Loss, TokenWeighting

MARGIN: Final = 1.0
GAMMA: Final = 5.0
"""The published margin of the hinge and width of the smooth hinge's quadratic part."""


def exactly(values: torch.Tensor) -> torch.Tensor:
    """Return values in float64 where the device has it.

    Exponentials in float32 differ in the last bit with where in a tensor a value stands (in a vector of the processor, or
    in what is left over at the end); in float64 they do too, but rounded to float32 they agree, save once in many millions.
    So a head in a stack has the gradients of the same head alone, and one margin per comparison costs next to nothing.
    """
    return values.float() if values.device.type == "mps" else values.double()


def rounded_sum(values: torch.Tensor) -> float:
    """Return the sum of some losses, (s,): the same for a head in a stack and alone, whatever threads and batches.

    Each is rounded to float32 first, in which both agree, and NumPy adds them in one order.
    """
    return float(values.float().cpu().contiguous().numpy().sum(dtype=np.float64))


def cross_entropy(margins: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return -log P(y) of each comparison, where P(response_2 preferred) = sigmoid(margin).

    It equals the cross-entropy over the two rewards. A tie (y = 0) counts one half for each side.

    Args:
        margins: (..., n).
        y: -1, 0 or +1, (n,).
    """
    return F.softplus(margins) - margins * ((y + 1) / 2)


def hinge(margins: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return max(0, 1 - y m); a tie counts one half for each side. Arguments as for `cross_entropy`."""
    return _both_sides(F.relu(MARGIN - margins), F.relu(MARGIN + margins), y)


def smooth_hinge(margins: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the hinge with its corner rounded over a width of gamma = 5.

    With t = y m: max(0, 1 - t)^2 / (2 gamma) for t >= 1 - gamma, and 1 - gamma / 2 - t below. Arguments as for
    `cross_entropy`. (Published PAL implementation.)
    """
    return _both_sides(_rounded(margins), _rounded(-margins), y)


def _rounded(t: torch.Tensor) -> torch.Tensor:
    short = F.relu(MARGIN - t)
    return torch.where(short <= GAMMA, short.clamp(max=GAMMA).square() * (0.5 / GAMMA), short - 0.5 * GAMMA)


def _both_sides(right: torch.Tensor, left: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the loss for y = +1 where it holds, that for y = -1 where it holds, and their mean for ties."""
    return torch.where(y > 0, right, torch.where(y < 0, left, (right + left) / 2))


def pairwise_loss(kind: Loss, margins: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the loss of each comparison, of the margins' shape.

    `logistic` is -log sigmoid(y m) and equals `cross_entropy`, which is written over the two rewards.
    """
    if kind == "hinge":
        return hinge(margins, y)
    return smooth_hinge(margins, y) if kind == "smooth_hinge" else cross_entropy(margins, y)


def user_weights(user: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return weights of sum 1 that count every user of a batch by 1 / the user's number of comparisons, (n,).

    Args:
        user: number of the user per comparison, (n,).
        counts: number of training comparisons of each user, (u,); a user of the batch has at least one.
    """
    weights = 1 / counts[user].clamp(min=1).to(torch.float32)
    return weights / weights.sum()


def reduce_loss(losses: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean over comparisons, or the sum weighted by `weights`, (..., n) -> (...,)."""
    return losses.mean(-1) if weights is None else (losses * weights).sum(-1)


def position_weights(
    weighting: TokenWeighting, rank: torch.Tensor, count: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the weight of each position, (m,); they sum to 1 over a span, and to 0 over an empty one.

    With c positions in a span, the i-th (from 1) weighs 1 / c for `mean`, i / (c (c + 1) / 2) for `cumulative`, and 1 at
    i = c alone for `only_last`; a rank outside 1 to c weighs 0. (Published PAL implementation.)

    Args:
        weighting: which.
        rank: i, (m,) int64.
        count: c of each position's span, (m,) int64.
        dtype: of the weights.
    """
    if weighting == "only_last":
        return ((rank == count) & (count > 0)).to(dtype)
    inside = ((rank >= 1) & (rank <= count)).to(dtype)
    if weighting == "mean":
        return inside / count.clamp(min=1)
    return inside * rank * (2 / (count * (count + 1)).clamp(min=2).to(dtype))


def token_losses(kind: Loss, margins: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted loss of each position, (m,): their sum over a span is the comparison's loss.

    Positions of weight 0 have no part in it, whatever their margins.

    Args:
        kind: loss at a position.
        margins: r(response_2) - r(response_1) at each position, (m,).
        y: -1, 0 or +1, (m,).
        weights: as `position_weights` gives them, (m,).
    """
    return pairwise_loss(kind, margins.masked_fill(weights == 0, 0.0), y) * weights


def norm_bound(points: torch.Tensor, bound: float | torch.Tensor) -> torch.Tensor:
    """Return the sum over rows of max(0, |row| - bound), (..., m, p) -> (...,)."""
    return F.relu(torch.linalg.vector_norm(points, dim=-1) - bound).sum(-1)
