"""Yardsticks that are solved at once, without training: principal directions, and one logistic regression per user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
import torch.nn.functional as F

from palcache.configs import HeadConfig
from palcache.heads.baselines import Yardstick, linear_margins
from palcache.heads.projectors import Parameters
from palcache.heads.scores import lookup
from palcache.noises import Noise
from palcache.tensors import PairBatch, PreferenceData

ROWS: Final = 8_192
STRENGTHS: Final = (0.01, 0.1, 1.0, 10.0)
"""Ridge strengths, times the mean squared norm of the differences, of which validation chooses one for all users."""
ITERATIONS: Final = 100
TINY: Final = 1e-12


@final
@dataclass(frozen=True, slots=True)
class PrincipalDirections(Yardstick):
    """Rewards along the k principal directions of the differences of responses, weighted by each user's answers.

    A user's weight on a direction is the mean of the answers times the differences along it, over the variance along it:
    least squares under the population's second moments. Nothing is trained.

    Attributes:
        d: width of the encoder's vectors.
        k: number of directions.
        users: number of users, u.
    """

    closed_form: ClassVar[bool] = True

    d: int
    k: int
    users: int

    @classmethod
    def from_config(cls, config: HeadConfig, *, d: int, users: int) -> PrincipalDirections:
        """Build the shape for an encoder of width d and a number of users; at most d directions."""
        return cls(d, min(config.k, d), users)

    def initial(self, generator: torch.Generator) -> Parameters:  # noqa: ARG002 - nothing is random
        """Return parameters that give everyone the reward 0: `basis` (k, d) and `user.weights` (u, k)."""
        return {"basis": torch.zeros(self.k, self.d), "user.weights": torch.zeros(self.users, self.k)}

    def mixtures(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return every user's weights over the directions, (u, k)."""
        return parameters["user.weights"]

    def margins(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,  # noqa: ARG002 - nothing is random
        updates: Parameters | None = None,  # noqa: ARG002 - there are no statistics
    ) -> torch.Tensor:
        """Return r(response_2) - r(response_1), (n,); arguments as for `palcache.heads.Head.margins`."""
        weights = lookup(self.mixtures(parameters), batch.user) if mixtures is None else mixtures
        return linear_margins(parameters["basis"], batch, weights)

    def solve(self, train: PreferenceData, val: PreferenceData) -> Parameters:  # noqa: ARG002 - nothing is chosen
        """Return the directions of most variance and every user's weights; a user without answers gets zeros."""
        where = train.device
        moment = torch.zeros(self.d, self.d, device=where)
        totals = torch.zeros(self.users, self.d, device=where)
        counts = torch.zeros(self.users, device=where)
        for difference, user, y in _differences(train):
            moment += difference.T @ difference
            totals.index_add_(0, user, difference * y.unsqueeze(-1))
            counts.index_add_(0, user, torch.ones_like(y))
        values, vectors = torch.linalg.eigh(moment.cpu() / max(1, len(train)))
        variance, basis = values[-self.k :].flip(0).to(where), vectors[:, -self.k :].flip(1).T.to(where)
        signs = torch.where(basis.gather(1, basis.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
        basis = basis * signs  # the largest entry is positive: eigenvectors have no sign of their own
        weights = (totals / counts.clamp(min=1).unsqueeze(-1)) @ basis.T / variance.clamp(min=TINY)
        return {"basis": basis.contiguous(), "user.weights": torch.where(variance > TINY, weights, 0.0)}


@final
@dataclass(frozen=True, slots=True)
class PerUser(Yardstick):
    """One linear reward per user, each a logistic regression on the user's own comparisons.

    Attributes:
        d: width of the encoder's vectors.
        users: number of users, u.
    """

    closed_form: ClassVar[bool] = True

    d: int
    users: int

    @classmethod
    def from_config(cls, config: HeadConfig, *, d: int, users: int) -> PerUser:  # noqa: ARG003 - nothing is chosen
        """Build the shape for an encoder of width d and a number of users."""
        return cls(d, users)

    @property
    def k(self) -> int:
        """Every user has a reward of their own."""
        return self.users

    def initial(self, generator: torch.Generator) -> Parameters:  # noqa: ARG002 - nothing is random
        """Return parameters that give everyone the reward 0: `user.weights` (u, d)."""
        return {"user.weights": torch.zeros(self.users, self.d)}

    def mixtures(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return every user's linear reward, (u, d)."""
        return parameters["user.weights"]

    def margins(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,  # noqa: ARG002 - nothing is random
        updates: Parameters | None = None,  # noqa: ARG002 - there are no statistics
    ) -> torch.Tensor:
        """Return r(response_2) - r(response_1), (n,); `mixtures` are linear rewards, (n, d)."""
        weights = lookup(self.mixtures(parameters), batch.user) if mixtures is None else mixtures
        return ((batch.responses[batch.response_2] - batch.responses[batch.response_1]) * weights).sum(-1)

    def solve(self, train: PreferenceData, val: PreferenceData) -> Parameters:
        """Return the ridge logistic regressions of all users, with the strength of the lowest validation loss.

        A user without answers gets zeros. The problems of all users are one convex problem, solved by L-BFGS.
        """
        weights = torch.zeros(self.users, self.d, device=train.device)
        size = sum(float(difference.square().sum()) for difference, _, _ in _differences(train)) / max(1, len(train))
        best, lowest = weights, float("inf")
        for strength in sorted(STRENGTHS, reverse=True):  # from stiff to loose, each from the one before
            weights = _ridge_logistic(weights, train, strength * max(size, TINY))
            loss = float(_loss(weights, val)) / max(1, len(val))
            if loss < lowest:
                best, lowest = weights, loss
        return {"user.weights": best}


def _differences(data: PreferenceData) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield right minus left, (n, d), user and y, batch by batch."""
    for batch in data.batches(ROWS):
        yield batch.responses[batch.response_2] - batch.responses[batch.response_1], batch.user, batch.y


def _loss(weights: torch.Tensor, data: PreferenceData) -> torch.Tensor:
    """Return the sum of -log P(y) in nats; users who are not known (-1) have the mean reward."""
    rows = torch.cat([weights, weights.mean(0, keepdim=True)])
    total = torch.zeros((), device=weights.device)
    for difference, user, y in _differences(data):
        margin = (difference * lookup(rows, torch.where(user < 0, len(weights), user))).sum(-1)
        total = total + (F.softplus(margin) - margin * (y + 1) / 2).sum()
    return total


def _ridge_logistic(start: torch.Tensor, data: PreferenceData, strength: float) -> torch.Tensor:
    """Return the weights of the lowest sum of -log P(y) + strength / 2 |w|^2, (u, d)."""
    weights = start.clone().requires_grad_()
    search = torch.optim.LBFGS([weights], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = _loss(weights, data) + strength / 2 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
