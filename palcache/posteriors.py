"""Posteriors: every user's weights by maximum a posteriori, with their covariance, all users as one padded batch.

A user's weights are `w = softmax(theta / T)` with theta in the (k - 1)-dimensional space of logits that sum to zero
(adding a constant to all logits changes nothing), in coordinates z of an orthonormal basis: `theta = B z`. Under a prior
`z ~ N(m, S)` and the likelihood `P(y = +1) = sigmoid(margin(w))` the mode is found by Fisher scoring with step control
per user, and the posterior is approximated by the normal distribution around it (Laplace's method; Tierney and Kadane,
JASA 1986), its precision being `S^-1` plus the expected Fisher information of the comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F

from palcache.devices import side_by_side
from palcache.heads.mixtures import softmax_mixtures
from palcache.reductions import MIN_NORM, ReducedComparisons

CELLS: Final = 2_000_000
"""Numbers in the largest tensor of a padded batch (16 MB); users are solved in chunks of that size."""
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
        return softmax_mixtures(self.logits, self.temperature)

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
        return softmax_mixtures(z @ contrasts(size + 1).to(z).T, self.temperature)


def contrasts(k: int) -> torch.Tensor:
    """Return B, an orthonormal basis of the vectors that sum to zero (Helmert's), (k, k - 1) float64."""
    basis = torch.zeros(k, k - 1, dtype=torch.float64)
    for j in range(1, k):
        basis[:j, j - 1], basis[j, j - 1] = 1.0, -float(j)
        basis[:, j - 1] /= (j * (j + 1)) ** 0.5
    return basis


def coordinates(logits: torch.Tensor) -> torch.Tensor:
    """Return z of logits, (u, k) -> (u, k - 1) float64; a constant added to a row changes nothing."""
    return logits.double() @ contrasts(logits.shape[1]).to(logits.device)


@torch.no_grad()
def maximum_a_posteriori(reduced: ReducedComparisons, prior: Gaussian) -> Posteriors:
    """Return each user's mode and covariance; a user's result does not depend on who else is in the batch.

    A user without comparisons keeps the prior. Memory is bounded: users are solved in chunks of `CELLS` numbers, those
    with about as many comparisons together.
    """
    counts, size = reduced.counts, reduced.k - 1
    mean = prior.mean.expand(len(counts), size).clone()
    covariance = prior.covariance.expand(len(counts), size, size).clone()
    chunks = padded(reduced.user, counts, cells=CELLS // reduced.k**2)

    def solve(chunk: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return PaddedUsers.gather(reduced, chunk[1], prior).solve()

    for (users, _), found in zip(chunks, side_by_side(solve, chunks, mean.device), strict=True):
        mean[users], covariance[users] = found
    return Posteriors(mean, covariance, reduced.temperature)


@torch.no_grad()
def posteriors_at(reduced: ReducedComparisons, prior: Gaussian, mean: torch.Tensor) -> Posteriors:
    """Return the covariances that belong to given weights z, (u, k - 1), without moving them."""
    counts, size = reduced.counts, reduced.k - 1
    covariance = prior.covariance.expand(len(counts), size, size).clone()
    for users, rows in padded(reduced.user, counts, cells=CELLS // reduced.k**2):
        expansion = PaddedUsers.gather(reduced, rows, prior).expand(mean[users])
        covariance[users] = torch.linalg.inv(expansion.expected)
    return Posteriors(mean, covariance, reduced.temperature)


def padded(user: torch.Tensor, counts: torch.Tensor, *, cells: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return chunks of users with their rows, (c,) and (c, s), rows padded by -1; users without rows are left out.

    Args:
        user: number of each row's user, (n,).
        counts: rows of each user, (u,).
        cells: largest c x s, unless one user has more.
    """
    by_user = torch.argsort(user, stable=True)
    starts = counts.cumsum(0) - counts
    order = torch.argsort(counts, stable=True)
    order = order[counts[order] > 0]
    chunks, at, sizes = [], 0, counts[order].tolist()
    while at < len(sizes):
        end = at + 1
        while end < len(sizes) and (end + 1 - at) * sizes[end] <= cells:
            end += 1
        users = order[at:end]
        slot = torch.arange(sizes[end - 1], device=user.device)
        inside = slot < counts[users].unsqueeze(1)
        index = (starts[users].unsqueeze(1) + slot).clamp_max(len(user) - 1)
        chunks.append((users, torch.where(inside, by_user[index], -1)))
        at = end
    return chunks


@final
@dataclass(frozen=True, slots=True, eq=False)
class PaddedUsers:
    """c users with up to s comparisons each; a padded comparison has b = 0 and so no gradient.

    Attributes:
        b: (c, s, k).
        grams: (c, s, k, k).
        target: (y + 1) / 2, (c, s).
        prior: of the users.
        precision: the prior's, (k - 1, k - 1).
        temperature: of the softmax.
    """

    b: torch.Tensor
    grams: torch.Tensor
    target: torch.Tensor
    prior: Gaussian
    precision: torch.Tensor
    temperature: float

    @classmethod
    def gather(cls, reduced: ReducedComparisons, rows: torch.Tensor, prior: Gaussian) -> PaddedUsers:
        """Collect the comparisons at padded rows, (c, s)."""
        kept = rows.clamp_min(0)
        b = reduced.b[kept] * (rows >= 0).unsqueeze(-1)
        precision = torch.linalg.inv(prior.covariance)
        grams, target = reduced.grams[reduced.prompt[kept]], (reduced.y[kept] + 1) / 2
        return cls(b, grams, target, prior, precision, reduced.temperature)

    def take(self, users: torch.Tensor) -> PaddedUsers:
        """Return some of the users."""
        parts = (self.b[users], self.grams[users], self.target[users])
        return PaddedUsers(*parts, self.prior, self.precision, self.temperature)

    def expand(self, z: torch.Tensor) -> Expansion:
        """Return the negative log-posterior around z, (c, k - 1)."""
        w, by_z, margins, turned, root = self._margins(z)
        probability = torch.sigmoid(margins)
        residual, cosine = (probability - self.target).unsqueeze(1), (margins / root**2).unsqueeze(-1)
        by_mixture = self.b / root.unsqueeze(-1) - cosine * turned
        away = z - self.prior.mean
        pull = away @ self.precision
        loss = (F.softplus(margins) - margins * self.target).sum(1) + (away * pull).sum(1) / 2
        force = (residual @ by_mixture).squeeze(1)  # the likelihood's gradient in w
        slopes = by_mixture @ by_z
        weighted = slopes * (probability * (1 - probability)).unsqueeze(-1)
        expected = weighted.transpose(1, 2) @ slopes + self.precision
        # The margins' own curvature: d2(b.w q^-1/2) = -q^-3/2 (b v' + v b') - b.w q^-3/2 M + 3 b.w q^-5/2 v v', v = M w.
        scaled = residual.squeeze(1).unsqueeze(-1) * turned
        cross = (scaled / root.unsqueeze(-1) ** 3).transpose(1, 2) @ self.b
        grams = (residual * cosine.squeeze(-1).unsqueeze(1)) @ self.grams.flatten(2)
        outer = (3 * scaled * cosine / root.unsqueeze(-1) ** 2).transpose(1, 2) @ turned
        bend = outer - cross - cross.transpose(1, 2) - grams.reshape(outer.shape)
        tilt = w * (force - (force * w).sum(-1, keepdim=True)) / self.temperature**2
        mixed = tilt.unsqueeze(-1) * w.unsqueeze(1)
        basis = contrasts(w.shape[1]).to(w)
        softmax = basis.T @ (torch.diag_embed(tilt) - mixed - mixed.transpose(1, 2)) @ basis
        observed = expected + by_z.transpose(1, 2) @ bend @ by_z + softmax
        return Expansion(loss, (force.unsqueeze(1) @ by_z).squeeze(1) + pull, expected, observed)

    def _margins(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return w (c, k), dw/dz (c, k, k - 1), margins (c, s), M w (c, s, k) and sqrt(w' M w) (c, s)."""
        c, s, k = self.b.shape
        basis = contrasts(k).to(z)
        w = softmax_mixtures(z @ basis.T, self.temperature)
        by_z = w.unsqueeze(-1) * (basis - (w @ basis).unsqueeze(1)) / self.temperature
        turned = (self.grams.reshape(c, s * k, k) @ w.unsqueeze(-1)).reshape(c, s, k)
        root = (turned @ w.unsqueeze(-1)).squeeze(-1).clamp_min(MIN_NORM**2).sqrt()
        return w, by_z, (self.b @ w.unsqueeze(-1)).squeeze(-1) / root, turned, root

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the modes (c, k - 1) and the covariances there: Newton's steps, damped where one fails."""
        users = len(self.b)
        best = self.prior.mean.expand(users, -1).clone()
        covariance = torch.empty(users, *self.precision.shape, dtype=best.dtype, device=best.device)
        chunk, alive, z = self, torch.arange(users, device=best.device), best.clone()
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


def margins_and_slopes(
    b: torch.Tensor, grams: torch.Tensor, z: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return margins and their gradients in z: (..., k), (..., k, k), (..., k - 1) -> (...), (..., k - 1)."""
    basis = contrasts(b.shape[-1]).to(b)
    w = softmax_mixtures(z @ basis.T, temperature)
    spread = (grams @ w.unsqueeze(-1)).squeeze(-1)
    square = (w * spread).sum(-1, keepdim=True).clamp_min(MIN_NORM**2)
    root = square.sqrt()
    margins = (b * w).sum(-1, keepdim=True) / root
    by_mixture = b / root - margins * spread / square
    by_logit = w * (by_mixture - (w * by_mixture).sum(-1, keepdim=True)) / temperature
    return margins.squeeze(-1), by_logit @ basis
