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
from palcache.posteriors import Posteriors, contrasts, margins_and_slopes
from palcache.reductions import ReducedComparisons

SAMPLES: Final = 64
"""Draws from the posterior over which information is averaged."""
_CELLS: Final = 4_000_000


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
    k = pool.k
    logits = user.samples(SAMPLES, seed=seed)[0].clamp_min(1e-12).log() * pool.temperature
    z = logits @ contrasts(k).to(logits)
    parts = [torch.empty(0, k - 1, k - 1, dtype=pool.b.dtype, device=pool.b.device)]
    for rows in torch.split(torch.arange(len(pool), device=pool.b.device), max(1, _CELLS // (SAMPLES * k * k))):
        grams = pool.grams[pool.prompt[rows]].unsqueeze(1)
        margins, slopes = margins_and_slopes(pool.b[rows].unsqueeze(1), grams, z, pool.temperature)
        probability = torch.sigmoid(margins)
        weighted = slopes * (probability * (1 - probability)).unsqueeze(-1)
        parts.append(weighted.transpose(1, 2) @ slopes / SAMPLES)
    return torch.cat(parts)
