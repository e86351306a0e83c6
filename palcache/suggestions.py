"""Suggestions: which comparisons of a pool would tell most about a user, from texts alone and never from answers.

The answer to a comparison carries the expected Fisher information `I(z) = p (1 - p) J J'` about the user's coordinates z,
p being the probability of an answer and J the gradient of its margin. Its mean over the user's posterior is added to the
posterior's precision, and the comparison that raises the log-determinant most is taken next (Bayesian D-optimal design,
greedy; Chaloner and Verdinelli, Statistical Science 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch

from palcache.errors import InputError
from palcache.padded_users import CELLS, PaddedUsers, coordinates, row_cells
from palcache.posteriors import Posteriors
from palcache.reductions import ReducedComparisons

SAMPLES: Final = 64
"""Draws from the posterior over which information is averaged."""


@final
@dataclass(frozen=True, slots=True)
class Suggestion:
    """A comparison worth asking.

    Attributes:
        row: its row in the pool.
        gain: expected gain in information, in nats: half the rise of the log-determinant of the posterior's precision.
    """

    row: int
    gain: float


@torch.no_grad()
def suggest(pool: ReducedComparisons, user: Posteriors, count: int, *, seed: int = 0) -> tuple[Suggestion, ...]:
    """Return the comparisons to ask a user next, best first; each one allows for those before it.

    Args:
        pool: candidates; their answers and users are not looked at.
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
    information = expected_information(pool, user, seed=seed)
    precision = torch.linalg.inv(user.covariance[0])
    open_, chosen = torch.ones(len(pool), dtype=torch.bool, device=precision.device), []
    for _ in range(min(count, len(pool))):
        gains = (torch.linalg.slogdet(precision + information)[1] - torch.linalg.slogdet(precision)[1]) / 2
        best = int(torch.where(open_, gains, -torch.inf).argmax())
        chosen.append(Suggestion(best, float(gains[best])))
        open_[best] = False
        precision = precision + information[best]
    return tuple(chosen)


def expected_information(pool: ReducedComparisons, user: Posteriors, *, seed: int = 0) -> torch.Tensor:
    """Return each comparison's Fisher information, averaged over a user's posterior, (n, k - 1, k - 1)."""
    z = coordinates(user.samples(SAMPLES, seed=seed)[0].clamp_min(1e-12).log() * pool.temperature)
    rows = torch.arange(len(pool), device=pool.device)
    parts = [pool.products.new_empty(0, pool.k - 1, pool.k - 1)]
    for at in torch.split(rows, max(1, CELLS // (SAMPLES * row_cells(pool)))):
        local = PaddedUsers.gather(pool, at.expand(SAMPLES, -1)).around(z)
        probability = torch.sigmoid(local.margins)
        weighted = local.slopes * (probability * (1 - probability)).unsqueeze(-1)
        parts.append(weighted.permute(1, 2, 0) @ local.slopes.transpose(0, 1) / SAMPLES)
    return torch.cat(parts)
