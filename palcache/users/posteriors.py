"""Posteriors: every user's weights by maximum a posteriori, with their covariance, all users as one padded batch.

In the coordinates z of `palcache.users.padded_users`, under a prior `z ~ N(m, S)` and the likelihood
`P(y = +1) = sigmoid(margin)`, the mode is found by Newton's steps with step control per user, and the posterior is
approximated by the normal distribution around it (Laplace's method; Tierney and Kadane, JASA 1986), its precision being
`S^-1` plus the expected Fisher information of the comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch

from palcache.devices import side_by_side
from palcache.users.padded_users import CELLS, PaddedUsers, contrasts, mixtures_at, padded, row_cells
from palcache.users.reductions import ReducedComparisons

START: Final = 1.5
"""Standard deviations of the prior from its mean to the other points where a search may begin."""
STEPS: Final = 100
TOLERANCE: Final = 1e-7
"""A user is done when a step would move no coordinate by more than this, or after `STEPS` steps."""
ROUNDING: Final = 1e-13
"""A step may raise the loss by this share of it, which is rounding."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """A normal distribution of users in the coordinates z, float64.

    Attributes:
        mean: (k - 1,).
        covariance: (k - 1, k - 1), positive definite.
    """

    mean: torch.Tensor
    covariance: torch.Tensor

    def to(self, device: torch.device) -> Gaussian:
        """Return the distribution on another device."""
        return Gaussian(self.mean.to(device), self.covariance.to(device))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Posteriors:
    """What is known of u users after their comparisons.

    Attributes:
        mean: the mode in the coordinates z, (u, k - 1) float64.
        covariance: (u, k - 1, k - 1) float64.
        temperature: of the head's softmax.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    temperature: float

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def logits(self) -> torch.Tensor:
        """User weights before the softmax, rows summing to zero, (u, k)."""
        return self.mean @ contrasts(self.mean.shape[1] + 1).to(self.mean).T

    @property
    def mixtures(self) -> torch.Tensor:
        """Mixtures at the mode, (u, k)."""
        return mixtures_at(self.mean, self.temperature)

    def take(self, users: torch.Tensor) -> Posteriors:
        """Return some of the users."""
        return Posteriors(self.mean[users], self.covariance[users], self.temperature)

    def samples(self, count: int, *, seed: int = 0) -> torch.Tensor:
        """Return mixtures drawn from the posteriors, (u, count, k); all users share the underlying normal draws."""
        generator = torch.Generator().manual_seed(seed)
        size = self.mean.shape[1]
        half = torch.randn(-(-count // 2), size, generator=generator, dtype=torch.float64)
        normal = torch.cat([half, -half])[:count].to(self.mean)  # antithetic: the mean of z is exact
        z = self.mean.unsqueeze(1) + normal @ torch.linalg.cholesky(self.covariance).transpose(1, 2)
        return mixtures_at(z, self.temperature)


@torch.no_grad()
def maximum_a_posteriori(reduced: ReducedComparisons, prior: Gaussian) -> Posteriors:
    """Return each user's mode and covariance; a user's result does not depend on who else is in the batch.

    A user without comparisons keeps the prior. Memory is bounded: users are solved in chunks of `CELLS` numbers, those
    with about as many comparisons together.
    """
    counts, size = reduced.counts, reduced.k - 1
    mean = prior.mean.expand(len(counts), size).clone()
    covariance = prior.covariance.expand(len(counts), size, size).clone()
    chunks = padded(reduced.user, counts, cells=CELLS // row_cells(reduced))

    def solve(chunk: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return Objective.of(reduced, chunk[1], prior).solve()

    for (users, _), found in zip(chunks, side_by_side(solve, chunks, mean.device), strict=True):
        mean[users], covariance[users] = found
    return Posteriors(mean, covariance, reduced.temperature)


@torch.no_grad()
def posteriors_at(reduced: ReducedComparisons, prior: Gaussian, mean: torch.Tensor) -> Posteriors:
    """Return the covariances that belong to given weights z, (u, k - 1), without moving them."""
    counts, size = reduced.counts, reduced.k - 1
    covariance = prior.covariance.expand(len(counts), size, size).clone()
    for users, rows in padded(reduced.user, counts, cells=CELLS // row_cells(reduced)):
        covariance[users] = torch.linalg.inv(Objective.of(reduced, rows, prior).expand(mean[users]).expected)
    return Posteriors(mean, covariance, reduced.temperature)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """The negative log-posterior of c users.

    Attributes:
        users: their comparisons.
        prior: of the users.
        precision: the prior's, (k - 1, k - 1).
    """

    users: PaddedUsers
    prior: Gaussian
    precision: torch.Tensor

    @classmethod
    def of(cls, reduced: ReducedComparisons, rows: torch.Tensor, prior: Gaussian) -> Objective:
        """Collect the comparisons at padded rows, (c, s)."""
        return cls(PaddedUsers.gather(reduced, rows), prior, torch.linalg.inv(prior.covariance))

    def take(self, users: torch.Tensor) -> Objective:
        """Return some of the users."""
        return Objective(self.users.take(users), self.prior, self.precision)

    def expand(self, z: torch.Tensor) -> Expansion:
        """Return the negative log-posterior around z, (c, k - 1)."""
        local = self.users.around(z)
        margins, slopes, inside = local.margins, local.slopes, self.users.inside
        probability = torch.sigmoid(margins)
        residual = (probability - self.users.target) * inside
        away = z - self.prior.mean
        pull = away @ self.precision
        loss = self.users.losses(margins) + (away * pull).sum(-1) / 2
        gradient = (residual.unsqueeze(1) @ slopes).squeeze(1) + pull
        weighted = slopes * (probability * (1 - probability) * inside).unsqueeze(-1)
        expected = weighted.transpose(1, 2) @ slopes + self.precision
        return Expansion(loss, gradient, expected, expected + local.curvature(residual))

    def values(self, z: torch.Tensor) -> torch.Tensor:
        """Return it at several points per user, (c, q, k - 1) -> (c, q)."""
        away = z - self.prior.mean
        return self.users.losses(self.users.margins_at(z)) + ((away @ self.precision) * away).sum(-1) / 2

    def start(self) -> torch.Tensor:
        """Return where to search for the mode, (c, k - 1): the best of the prior's mean and a point towards each prototype.

        A posterior may have several modes: far out on the simplex a mixture hardly changes with z.
        """
        mean, covariance = self.prior.mean, self.prior.covariance
        towards = contrasts(len(mean) + 1).to(mean) @ covariance
        length = ((towards @ self.precision) * towards).sum(1, keepdim=True).sqrt()
        points = torch.cat([mean.unsqueeze(0), mean + START * towards / length])
        values = self.values(points.expand(len(self.users), -1, -1))
        return points[values.argmin(1)]

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the modes (c, k - 1) and the covariances there: Newton's steps, damped where one fails."""
        users, z = len(self.users), self.start()
        best, covariance = z.clone(), z.new_empty(users, *self.precision.shape)
        chunk, alive = self, torch.arange(users, device=z.device)
        damping = torch.zeros(users, dtype=best.dtype, device=best.device)
        at = chunk.expand(z)
        for step in range(STEPS):
            move = at.move(damping, self.precision)
            done = (move.abs().amax(1) <= TOLERANCE) | (step == STEPS - 1)
            if bool(done.any()):
                best[alive[done]], covariance[alive[done]] = z[done], torch.linalg.inv(at.expected[done])
                left = torch.nonzero(~done)[:, 0]
                if not len(left):
                    break
                chunk, at, alive = chunk.take(left), at.take(left), alive[left]
                z, damping, move = z[left], damping[left], move[left]
            fresh = chunk.expand(z + move)
            better = fresh.loss <= at.loss + ROUNDING * (1 + at.loss)
            z, at = torch.where(better[:, None], z + move, z), fresh.where(better, at)
            damping = torch.where(better, damping / 8, 8 * damping.clamp_min(1 / 8))
        return best, covariance


@final
@dataclass(frozen=True, slots=True, eq=False)
class Expansion:
    """The negative log-posterior of c users around a point, to second order.

    Attributes:
        loss: (c,).
        gradient: (c, k - 1).
        expected: expectation of the Hessian over answers, positive definite, (c, k - 1, k - 1).
        observed: the Hessian, (c, k - 1, k - 1).
    """

    loss: torch.Tensor
    gradient: torch.Tensor
    expected: torch.Tensor
    observed: torch.Tensor

    def move(self, damping: torch.Tensor, precision: torch.Tensor) -> torch.Tensor:
        """Return Newton's step, or Fisher's where the Hessian is not positive definite; damped by the prior's precision."""
        extra = damping[:, None, None] * precision
        convex = torch.linalg.cholesky_ex(self.observed + extra)[1] == 0
        hessian = torch.where(convex[:, None, None], self.observed, self.expected) + extra
        step: torch.Tensor = torch.linalg.solve_ex(hessian, -self.gradient.unsqueeze(-1))[0]
        return step.squeeze(-1)

    def take(self, users: torch.Tensor) -> Expansion:
        """Return some of the users."""
        return Expansion(self.loss[users], self.gradient[users], self.expected[users], self.observed[users])

    def where(self, mine: torch.Tensor, other: Expansion) -> Expansion:
        """Return this expansion for the users of `mine`, the other for the rest."""
        wide = mine[:, None, None]
        return Expansion(
            torch.where(mine, self.loss, other.loss),
            torch.where(mine[:, None], self.gradient, other.gradient),
            torch.where(wide, self.expected, other.expected),
            torch.where(wide, self.observed, other.observed),
        )
