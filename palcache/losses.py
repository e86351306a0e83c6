"""Pairwise losses: pure functions of margins r(response_2) - r(response_1) and labels, in nats where they are likelihoods.

Token losses apply a loss at every token position and weigh the positions of each comparison's span.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from palcache.choices import Loss, TokenWeighting

MARGIN: Final = 1.0
GAMMA: Final = 5.0
"""The published margin of the hinge and width of the smooth hinge's quadratic part."""


def cross_entropy(margins: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return -log P(y) of each comparison, where P(response_2 preferred) = sigmoid(margin).

    It equals the cross-entropy over the two rewards. A tie (y = 0) counts one half for each side.

    Args:
        margins: (..., n).
        y: -1, 0 or +1, (n,), of the margins' dtype.
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


def in_span(t: int, divergence: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return which of t positions are in each comparison's span [divergence, end), (n, t) bool."""
    at = torch.arange(t, device=end.device)
    return (at >= divergence.unsqueeze(-1)) & (at < end.unsqueeze(-1))


def span_weights(
    weighting: TokenWeighting, t: int, divergence: torch.Tensor, end: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the weight of each position, (n, t); they sum to 1 over a span, and to 0 over an empty one.

    With m positions in a span, the i-th (from 1) weighs 1 / m for `mean`, i / (m (m + 1) / 2) for `cumulative`, and 1 at
    i = m alone for `only_last`. (Published PAL implementation.)

    Args:
        weighting: which.
        t: positions.
        divergence: first position of each span, (n,).
        end: position after its last, (n,); those at or beyond t are not there.
        dtype: of the weights.
    """
    first, last = divergence.clamp(min=0).to(dtype), end.clamp(max=t).to(dtype)
    count, at = (last - first).clamp(min=0), torch.arange(t, device=end.device, dtype=dtype)
    if weighting == "only_last":
        return ((at == (last - 1).unsqueeze(-1)) & (count > 0).unsqueeze(-1)).to(dtype)
    inside = (at >= first.unsqueeze(-1)) & (at < last.unsqueeze(-1))
    if weighting == "mean":
        return inside * (1 / count.clamp(min=1)).unsqueeze(-1)
    rank = at - (first - 1).unsqueeze(-1)
    return inside * rank * (2 / (count * (count + 1)).clamp(min=2)).unsqueeze(-1)


def token_loss(
    kind: Loss,
    margins: torch.Tensor,
    y: torch.Tensor,
    divergence: torch.Tensor,
    end: torch.Tensor,
    weighting: TokenWeighting,
) -> torch.Tensor:
    """Return the loss of each comparison over its span, (n,); 0 for an empty span.

    Positions outside the spans have no part in it, whatever their margins.

    Args:
        kind: loss at a position.
        margins: r(response_2) - r(response_1) at each position, (n, t).
        y: (n,).
        divergence: (n,).
        end: (n,).
        weighting: of the positions.
    """
    weights = span_weights(weighting, margins.shape[-1], divergence, end, margins.dtype)
    margins = margins.masked_fill(weights == 0, 0.0)
    return (pairwise_loss(kind, margins, y.unsqueeze(-1)) * weights).sum(-1)


def token_accuracy(margins: torch.Tensor, y: torch.Tensor, divergence: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return the share of a span's positions that are predicted right, (n,); a zero margin counts one half.

    An empty span counts 0. Arguments as for `token_loss`.
    """
    right = (1 + margins.sign() * y.unsqueeze(-1).sign()) / 2
    return (right * span_weights("mean", margins.shape[-1], divergence, end, margins.dtype)).sum(-1)


def norm_bound(points: torch.Tensor, bound: float | torch.Tensor) -> torch.Tensor:
    """Return the sum over rows of max(0, |row| - bound), (..., m, p) -> (...,)."""
    return F.relu(torch.linalg.vector_norm(points, dim=-1) - bound).sum(-1)
