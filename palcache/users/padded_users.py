"""Padded users: the comparisons of many users as one batch, with margins and their derivatives in the users' coordinates.

A user's weights are `w = softmax(theta / T)` with theta in the (k - 1)-dimensional space of logits that sum to zero
(adding a constant to all logits changes nothing), in coordinates z of an orthonormal basis: `theta = B z`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, final

import torch
import torch.nn.functional as F

from palcache.heads.mixtures import softmax_mixtures
from palcache.users.jets import Jet, Kind, jet, reward
from palcache.users.reductions import IdealPoint, ReducedComparisons, quadratic

CELLS: Final = 2_000_000
"""Numbers in the largest tensor of a padded batch (16 MB); users are taken in chunks of that size."""


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


def mixtures_at(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return mixtures of coordinates, (..., k - 1) -> (..., k)."""
    return softmax_mixtures(z @ contrasts(z.shape[-1] + 1).to(z).T, temperature)


def row_cells(reduced: ReducedComparisons) -> int:
    """Return how many numbers a comparison takes in a padded batch."""
    return max(reduced.products[:1].numel(), reduced.k**2 if len(reduced.grams) > 1 else 1, 1)


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
    """c users with up to s comparisons each.

    Attributes:
        products: as in `ReducedComparisons`, (c, s, sides, m).
        squares: (c, s, sides).
        grams: (c, s, m, m), or (1, 1, m, m) where all comparisons share it.
        y: -1, 0 or +1, (c, s).
        inside: 1 for a comparison, 0 for padding, (c, s).
        signs: of the sides, (sides,).
        kind: of the reward.
        temperature: of the softmax.
        scale: factor of every margin.
        ideal: from mixtures to ideal points, where they are not the mixtures themselves.
    """

    products: torch.Tensor
    squares: torch.Tensor
    grams: torch.Tensor
    y: torch.Tensor
    inside: torch.Tensor
    signs: torch.Tensor
    kind: Kind
    temperature: float
    scale: float
    ideal: IdealPoint | None

    @classmethod
    def gather(cls, reduced: ReducedComparisons, rows: torch.Tensor) -> PaddedUsers:
        """Collect the comparisons at padded rows, (c, s), -1 where there is none."""
        kept = rows.clamp_min(0)
        grams = reduced.grams.unsqueeze(0) if len(reduced.grams) == 1 else reduced.grams[reduced.prompt[kept]]
        inside = (rows >= 0).to(reduced.y)
        return cls(
            reduced.products[kept], reduced.squares[kept], grams, reduced.y[kept], inside, reduced.signs, reduced.kind,
            reduced.temperature, reduced.scale, reduced.ideal,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.y)

    @property
    def target(self) -> torch.Tensor:
        """(y + 1) / 2, (c, s)."""
        return (self.y + 1) / 2

    def take(self, users: torch.Tensor) -> PaddedUsers:
        """Return some of the users."""
        grams = self.grams if self.grams.shape[1] == 1 and len(self.grams) == 1 else self.grams[users]
        names = ("products", "squares", "y", "inside")
        return replace(self, grams=grams, **{name: getattr(self, name)[users] for name in names})

    def margins_at(self, z: torch.Tensor) -> torch.Tensor:
        """Return margins at several points per user, (c, q, k - 1) -> (c, s, q)."""
        c, s, sides, m = self.products.shape
        w = mixtures_at(z, self.temperature)
        points = w if self.ideal is None else self.ideal(w)
        t = (
            (self.products.reshape(c, s * sides, m) @ points.transpose(1, 2))
            .reshape(c, s, sides, z.shape[1])
            .transpose(2, 3)
        )
        q = quadratic(self.grams, points).unsqueeze(-1)
        return self.scale * (reward(self.kind, t, q, self.squares.unsqueeze(2)) @ self.signs)

    def losses(self, margins: torch.Tensor) -> torch.Tensor:
        """Return -log P(y) of a user's comparisons, (c, s, ...) -> (c, ...); a tie counts one half for each side."""
        wide = (*self.y.shape, *[1] * (margins.dim() - 2))
        losses = F.softplus(margins) - margins * self.target.reshape(wide)
        return (losses * self.inside.reshape(wide)).sum(1)

    def around(self, z: torch.Tensor) -> Local:
        """Return margins and their derivatives in z, (c, k - 1)."""
        c, s, sides, m = self.products.shape
        chart = _Chart.at(z, self.temperature, self.ideal)
        turned = (self.grams @ chart.point[:, None, :, None]).squeeze(-1)  # M a, (c, s, m) or (c, 1, m)
        t = (self.products.reshape(c, s * sides, m) @ chart.point.unsqueeze(-1)).reshape(c, s, sides)
        q = (turned @ chart.point.unsqueeze(-1)).expand(c, -1, sides)
        by_t = (self.products.reshape(c, s * sides, m) @ chart.jacobian).reshape(c, s, sides, z.shape[1])
        return Local(self, chart, turned, jet(self.kind, t, q, self.squares), by_t, turned @ chart.jacobian)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Chart:
    """Ideal points of c users and how they move with z.

    Attributes:
        w: mixtures, (c, k).
        point: ideal points, (c, m).
        by_w: their Jacobian in w, (c, m, k); None where they are w.
        spread: the Jacobian of w in z, (c, k, k - 1).
        jacobian: of the points in z, (c, m, k - 1).
        temperature: of the softmax.
        ideal: from mixtures to points.
    """

    w: torch.Tensor
    point: torch.Tensor
    by_w: torch.Tensor | None
    spread: torch.Tensor
    jacobian: torch.Tensor
    temperature: float
    ideal: IdealPoint | None

    @classmethod
    def at(cls, z: torch.Tensor, temperature: float, ideal: IdealPoint | None) -> _Chart:
        w, basis = mixtures_at(z, temperature), contrasts(z.shape[1] + 1).to(z)
        spread = w.unsqueeze(-1) * (basis - (w @ basis).unsqueeze(1)) / temperature
        if ideal is None:
            return cls(w, w, None, spread, spread, temperature, ideal)
        by_w = torch.func.vmap(torch.func.jacfwd(ideal))(w)
        return cls(w, ideal(w), by_w, spread, by_w @ spread, temperature, ideal)

    def bend(self, force: torch.Tensor) -> torch.Tensor:
        """Return the second derivative in z of `force . point`, (c, m) -> (c, k - 1, k - 1)."""
        ideal, basis = self.ideal, contrasts(self.w.shape[1]).to(self.w)
        along = force if self.by_w is None else (force.unsqueeze(1) @ self.by_w).squeeze(1)
        tilt = self.w * (along - (along * self.w).sum(-1, keepdim=True)) / self.temperature**2
        mixed = tilt.unsqueeze(-1) * self.w.unsqueeze(1)
        out = basis.T @ (torch.diag_embed(tilt) - mixed - mixed.transpose(1, 2)) @ basis
        if ideal is None:
            return out
        curve = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda w, f: (ideal(w) * f).sum())))(self.w, force)
        bent: torch.Tensor = out + self.spread.transpose(1, 2) @ curve @ self.spread
        return bent


@final
@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """Margins of c users around a point each, to second order.

    Attributes:
        users: whose.
        chart: their ideal points.
        turned: `M a` of each comparison, (c, s or 1, m).
        jet: of each side's reward, (c, s, sides).
        by_t: gradient of `t` in z, (c, s, sides, k - 1).
        by_q: half the gradient of `q` in z, (c, s or 1, k - 1).
    """

    users: PaddedUsers
    chart: _Chart
    turned: torch.Tensor
    jet: Jet
    by_t: torch.Tensor
    by_q: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """Margins, (c, s)."""
        return self._signed(self.jet.value).sum(-1)

    @property
    def slopes(self) -> torch.Tensor:
        """Gradients of the margins in z, (c, s, k - 1)."""
        along = (self._signed(self.jet.t).unsqueeze(-1) * self.by_t).sum(2)
        return along + 2 * self._signed(self.jet.q).sum(-1, keepdim=True) * self.by_q

    def curvature(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum of the margins' Hessians in z, weighted, (c, s) -> (c, k - 1, k - 1)."""
        c, s, sides, m = self.users.products.shape
        weights = weights.unsqueeze(-1)
        tt, tq, t = (weights * self._signed(part) for part in (self.jet.tt, self.jet.tq, self.jet.t))
        q, qq = ((weights * self._signed(part)).sum(-1) for part in (self.jet.q, self.jet.qq))
        straight = self.by_t.flatten(1, 2)
        out = (straight * tt.reshape(c, s * sides, 1)).transpose(1, 2) @ straight
        mixed = (tq.unsqueeze(-1) * self.by_t).sum(2)
        if self.by_q.shape[1] != s:  # one Gram matrix for all comparisons of a user
            mixed, q, qq = (part.sum(1, keepdim=True) for part in (mixed, q, qq))
        cross = mixed.transpose(1, 2) @ self.by_q
        out = out + 2 * (cross + cross.transpose(1, 2)) + 4 * (self.by_q * qq.unsqueeze(-1)).transpose(1, 2) @ self.by_q
        grams = self.users.grams
        gram = (q.unsqueeze(1) @ grams.flatten(2).expand(c, -1, -1)).reshape(c, m, m)
        out = out + 2 * self.chart.jacobian.transpose(1, 2) @ gram @ self.chart.jacobian
        products = self.users.products.reshape(c, s * sides, m)
        force = t.reshape(c, 1, s * sides) @ products + 2 * q.unsqueeze(1) @ self.turned
        return out + self.chart.bend(force.squeeze(1))

    def _signed(self, part: torch.Tensor) -> torch.Tensor:
        return part * (self.users.signs * self.users.scale)
