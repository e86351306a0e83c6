"""Priors: what the seen users say about a new one, before any comparison.

The prior is a normal distribution of users in the coordinates of `palcache.users.posteriors`. Mean, full covariance and so its
strength are those under which the seen users' validation comparisons are likeliest (empirical Bayes by
expectation-maximisation with Laplace's posteriors; Dempster, Laird and Rubin, JRSS B 1977). The weights that training left
with the seen users are not used: they were fitted together with the head, and stand as far out as early stopping let them
go. `docs/new_users.md` has the numbers.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from palcache.metrics import fit_temperature
from palcache.users.posteriors import Gaussian, maximum_a_posteriori
from palcache.users.reductions import ReducedComparisons

ROUNDS: Final = 30
"""Rounds of expectation-maximisation; where answers separate users perfectly the variance has no finite optimum."""
WIDTH: Final = 4.0
"""Variance from which it starts, and towards which it is shrunk."""
MAX_USERS: Final = 2_000
"""Seen users that are enough to fit a prior; of more, the first of a seeded permutation."""


def fit_noise(held_out: ReducedComparisons, mixtures: torch.Tensor) -> float:
    """Return what margins must be divided by for sigmoid(margin) to be the probability of an answer.

    It is the temperature that calibrates seen users' margins best, with one more answer, against a margin of the usual
    size, so that few comparisons, all predicted right, do not make a head all too sure.

    Args:
        held_out: comparisons of seen users that the head was not trained on; without any the noise is 1.
        mixtures: of these users, (u, k).
    """
    margins = held_out.margins(mixtures).cpu().numpy()
    if not len(margins):
        return 1.0
    usual = float(np.sqrt(np.mean(margins**2)))
    return fit_temperature(np.append(margins, usual), np.append(held_out.y.cpu().numpy(), -1.0))


@torch.no_grad()
def fit_prior(reduced: ReducedComparisons, *, seed: int = 0) -> Gaussian:
    """Return the prior under which the answers are likeliest, shrunk as if k - 1 more users had the variance `WIDTH`.

    Args:
        reduced: comparisons of seen users that the head was not trained on (validation); users without any say nothing.
        seed: of the choice of users where there are more than `MAX_USERS`.
    """
    size, options = reduced.k - 1, {"dtype": torch.float64, "device": reduced.device}
    start = WIDTH * torch.eye(size, **options)  # type: ignore[call-overload]
    prior = Gaussian(torch.zeros(size, **options), start)  # type: ignore[call-overload]
    reduced = _some_users(reduced, seed)
    answered = reduced.counts > 0
    for _ in range(ROUNDS if bool(answered.any()) else 0):
        posteriors = maximum_a_posteriori(reduced, prior)
        z = posteriors.mean[answered]
        mean = z.mean(0)
        away = z - mean
        scatter = away.T @ away + posteriors.covariance[answered].sum(0)
        prior = Gaussian(mean, (scatter + size * start) / (len(z) + size))
    return prior


def _some_users(reduced: ReducedComparisons, seed: int) -> ReducedComparisons:
    answered = torch.nonzero(reduced.counts.cpu())[:, 0]
    if len(answered) <= MAX_USERS:
        return reduced
    chosen = answered[torch.randperm(len(answered), generator=torch.Generator().manual_seed(seed))[:MAX_USERS]]
    kept = torch.isin(reduced.user, chosen.to(reduced.user.device))
    return reduced.take(torch.nonzero(kept)[:, 0])
