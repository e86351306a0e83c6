"""Suggestions: which comparisons of a pool would tell most about a user, from texts alone and never from answers.

The answer to a comparison carries the expected Fisher information `I(z) = p (1 - p) J J'` about the user's coordinates z,
p being the probability of an answer and J the gradient of its margin. The comparison is taken that raises most the
log-determinant of the posterior's precision plus the information of what has been taken before, averaged over draws of z
from the posterior (Bayesian D-optimal design; Chaloner and Verdinelli, Statistical Science 1995). The average is of the
log-determinants and not of the information: what is asked tells about the user whoever of the likely ones it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch

from palcache.errors import InputError
from palcache.users.padded_users import CELLS, PaddedUsers, coordinates, row_cells
from palcache.users.posteriors import Posteriors
from palcache.users.reductions import ReducedComparisons

SAMPLES: Final = 64
"""Draws from the posterior over which gains are averaged."""
SHORTLIST: Final = 4_096
"""Comparisons of the largest gains by themselves, among which a list is chosen; a gain only falls as others are taken."""


@final
@dataclass(frozen=True, slots=True)
class Suggestion:
    """A comparison worth asking.

    Attributes:
        row: its row in the pool.
        gain: expected gain in information, in nats: half the rise of the log-determinant of the precision.
    """

    row: int
    gain: float


@torch.no_grad()
def suggest(pool: ReducedComparisons, user: Posteriors, count: int, *, seed: int = 0) -> tuple[Suggestion, ...]:
    """Return the comparisons to ask a user next, best first; each one allows for those before it.

    Args:
        pool: candidates, calibrated; their answers and users are not looked at.
        user: what is known of one user.
        count: how many; fewer are returned where the pool is smaller.
        seed: of the draws from the posterior.

    Raises:
        InputError: `count` is below 1, or `user` is not one user.
    """
    if count < 1 or len(user) != 1:
        raise InputError(
            f"Got a count of {count} and {len(user)} users; expected at least one suggestion for one user."
        )
    rows = torch.arange(len(pool), device=pool.device)
    covariance = user.covariance.expand(SAMPLES, -1, -1)
    if len(pool) > SHORTLIST:
        chunks = torch.split(rows, max(1, CELLS // (SAMPLES * row_cells(pool))))
        alone = torch.cat([_gains(information_factors(pool.take(at), user, seed=seed), covariance)[0] for at in chunks])
        rows = torch.argsort(alone, descending=True, stable=True)[: max(SHORTLIST, count)]
    factors = information_factors(pool.take(rows), user, seed=seed)
    open_, chosen = torch.ones(len(rows), dtype=torch.bool, device=pool.device), []
    for _ in range(min(count, len(rows))):
        gains, spread = _gains(factors, covariance)
        best = int(torch.where(open_, gains, -torch.inf).argmax())
        chosen.append(Suggestion(int(rows[best]), float(gains[best])))
        open_[best] = False
        turned = spread[:, best]  # S^-1 grows by f f': Sherman and Morrison
        shrunk = 1 + (factors[:, best] * turned).sum(-1)
        covariance = covariance - turned.unsqueeze(2) * turned.unsqueeze(1) / shrunk[:, None, None]
    return tuple(chosen)


def _gains(factors: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gains averaged over draws, (n,), and `S f`, (SAMPLES, n, k - 1)."""
    spread = factors @ covariance
    return torch.log1p((spread * factors).sum(-1)).mean(0) / 2, spread


def information_factors(pool: ReducedComparisons, user: Posteriors, *, seed: int = 0) -> torch.Tensor:
    """Return f of each draw from a user's posterior and each comparison, whose information is `f f'`, (SAMPLES, n, k - 1)."""
    z = coordinates(user.samples(SAMPLES, seed=seed)[0].clamp_min(1e-12).log() * pool.temperature)
    rows = torch.arange(len(pool), device=pool.device)
    local = PaddedUsers.gather(pool, rows.expand(SAMPLES, -1)).around(z)
    probability = torch.sigmoid(local.margins)
    return local.slopes * (probability * (1 - probability)).sqrt().unsqueeze(-1)
