"""Is one rule right more often than others on the same comparisons? A paired test that resamples users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import numpy.typing as npt

from palcache.errors import InputError
from palcache.metrics import DRAWN_AT_ONCE, Array, Codes, Estimate

DRAWS: Final = 10_000
LEVEL: Final = 0.05


@final
@dataclass(frozen=True, slots=True)
class PairedTest:
    """How rules are tested against each other.

    Attributes:
        draws: of the bootstrap.
        level: below which a p-value supports a difference.
        seed: of the bootstrap.
    """

    draws: int = DRAWS
    level: float = LEVEL
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or not 0 < self.level < 1:
            raise InputError(
                f"Got {self.draws} draws and the level {self.level}; expected at least one draw and a level in (0, 1)."
            )


def paired_test(
    first: Array, others: Sequence[Array], user: Codes, *, draws: int = DRAWS, seed: int = 0
) -> list[tuple[Estimate, float]]:
    """Return by how much one rule is ahead of each other one, with its 95 % interval, and Holm's p-value.

    A draw takes whole users with replacement, the same ones for all rules. The p-value is two-sided: twice the share of
    draws in which the difference is zero or of the other sign, both counts raised by one (Davison and Hinkley, Bootstrap
    Methods and their Application, 1997, chapter 4), at most 1.

    Args:
        first: its correctness per comparison, (n,).
        others: that of each other rule, (n,) each.
        user: the user's code per comparison, (n,).
        draws: how many.
        seed: of the draws.
    """
    _, user = np.unique(user, return_inverse=True)
    count = np.bincount(user).astype(np.float64)
    ahead = np.stack([first - other for other in others], axis=1)
    total = np.stack([np.bincount(user, column) for column in ahead.T], axis=1)
    u, generator = len(count), np.random.Generator(np.random.PCG64(seed))
    step, parts = max(1, DRAWN_AT_ONCE // u), []
    for start in range(0, draws, step):
        times = generator.multinomial(u, np.full(u, 1 / u), size=min(step, draws - start)).astype(np.float64)
        parts.append((times @ total) / (times @ count)[:, None])
    sample = np.concatenate(parts)
    crossing = np.minimum((sample <= 0).sum(0), (sample >= 0).sum(0))
    p = holm(np.minimum(1, 2 * (1 + crossing) / (1 + draws)))
    low, high = np.quantile(sample, [0.025, 0.975], axis=0)
    estimates = [Estimate(float(v), float(a), float(b)) for v, a, b in zip(ahead.mean(0), low, high, strict=True)]
    return list(zip(estimates, p.tolist(), strict=True))


def holm(p: npt.ArrayLike) -> Array:
    """Return p-values corrected for their number, (m,) (Holm, Scandinavian Journal of Statistics, 1979)."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    out = np.empty(len(values))
    out[order] = np.minimum(1, raised)
    return out
