"""Credible regions: how sure one may be of a user's mixture, where a normal approximation is not enough.

With few comparisons a posterior is skew: the ellipsoid of Laplace's method holds the truth too seldom. Here draws around the
mode (multivariate t, Laplace's covariance) are weighted by the posterior itself (importance sampling), which gives mean and
deviation of the mixture, and the highest-density region `{z : excess(z) <= limit}`, where the excess of a point is twice
its negative log-posterior above the mode's. (Gelman et al., Bayesian Data Analysis, 3rd ed., 10.4 and 2.3.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

import torch

from palcache.users.padded_users import CELLS, mixtures_at, padded, row_cells
from palcache.users.posteriors import Gaussian, Objective, Posteriors
from palcache.users.reductions import ReducedComparisons

SAMPLES: Final = 512
FREEDOM: Final = 4
"""Degrees of freedom of the draws: heavier tails than the posterior's, so that no weight is large."""
LEVEL: Final = 0.95


@final
@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """What importance sampling says of u users.

    Attributes:
        mean: posterior mean of the mixture, (u, k).
        deviation: posterior standard deviation of each weight, (u, k).
        limit: the excess that bounds the region of probability `LEVEL`, (u,).
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    limit: torch.Tensor


@torch.no_grad()
def credible_regions(
    reduced: ReducedComparisons, prior: Gaussian, posteriors: Posteriors, *, samples: int = SAMPLES, seed: int = 0
) -> Regions:
    """Return the regions of users whose posteriors are known; all users share the underlying draws."""
    u, k = len(posteriors), reduced.k
    base, density = _draws(k - 1, samples, seed)
    mean, deviation = torch.empty(2, u, k, dtype=torch.float64, device=reduced.device)
    limit = torch.empty(u, dtype=torch.float64, device=reduced.device)
    for users, chunk in _chunks(reduced, prior, samples):
        part = posteriors.take(users)
        z = part.mean.unsqueeze(1) + base.to(part.mean) @ torch.linalg.cholesky(part.covariance).transpose(1, 2)
        loss, w = chunk.values(z), mixtures_at(z, reduced.temperature)
        weight = torch.softmax(-loss - density.to(loss), dim=1).unsqueeze(-1)
        mean[users] = (weight * w).sum(1)
        deviation[users] = (weight * (w - mean[users].unsqueeze(1)) ** 2).sum(1).sqrt()
        excess, order = torch.sort(2 * (loss - chunk.values(part.mean.unsqueeze(1))), dim=1)
        mass = torch.gather(weight.squeeze(-1), 1, order).cumsum(1)
        at = (mass < LEVEL).sum(1, keepdim=True).clamp_max(samples - 1)
        limit[users] = torch.gather(excess, 1, at).squeeze(1)
    return Regions(mean, deviation, limit)


@torch.no_grad()
def excess_at(reduced: ReducedComparisons, prior: Gaussian, posteriors: Posteriors, z: torch.Tensor) -> torch.Tensor:
    """Return the excess of a point per user, (u, k - 1) -> (u,): inside its region if at most the region's limit."""
    out = torch.empty(len(z), dtype=torch.float64, device=z.device)
    for users, chunk in _chunks(reduced, prior, 2):
        loss = chunk.values(torch.stack([z[users], posteriors.mean[users]], dim=1))
        out[users] = 2 * (loss[:, 0] - loss[:, 1])
    return out


def _draws(size: int, samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return draws of a standard multivariate t and their log-densities up to a constant, (samples, size), (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    squares = torch.randn(samples, FREEDOM, generator=generator, dtype=torch.float64).square().sum(1, keepdim=True)
    base = normal / (squares / FREEDOM).sqrt()
    return base, -(FREEDOM + size) / 2 * torch.log1p(base.square().sum(1) / FREEDOM)


def _chunks(reduced: ReducedComparisons, prior: Gaussian, width: int) -> Iterator[tuple[torch.Tensor, Objective]]:
    """Yield users in chunks that bound memory at `width` points per user; those without comparisons come last."""
    counts = reduced.counts
    sides = reduced.products.shape[1]
    for users, rows in padded(reduced.user, counts, cells=CELLS // max(sides * width, row_cells(reduced))):
        yield users, Objective.of(reduced, rows, prior)
    empty = torch.nonzero(counts == 0)[:, 0]
    for users in torch.split(empty, max(1, CELLS // (width * reduced.width))):
        if len(users):
            yield users, Objective.of(reduced, users.new_empty(len(users), 0), prior)
