"""Adaptation: new users on a frozen head from a handful of comparisons; only their mixtures are estimated.

Every method has one interface, works on reduced comparisons (`palcache.reductions`) for all users at once, and gives each
user what it would give that user alone. A user without comparisons has the population's own mixture, the mean of the seen
users' mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, final

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from palcache.checkpoints import TrainedHead
from palcache.errors import InputError
from palcache.fingerprints import text_keys
from palcache.heads.mixtures import softmax_mixtures
from palcache.posteriors import (
    Gaussian,
    Posteriors,
    contrasts,
    coordinates,
    margins_and_slopes,
    maximum_a_posteriori,
    padded,
    posteriors_at,
)
from palcache.priors import fit_prior
from palcache.reductions import MIN_NORM, ReducedComparisons, reduce_comparisons
from palcache.tensors import PreferenceData

MethodName = Literal["map", "published", "likelihood", "generic"]
SMALLEST: Final = 1e-6
"""Shares below this count as this where a mixture is turned into logits."""
_CELLS: Final = 4_000_000


@final
@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """What the seen users say about new ones; float64, on one device.

    Attributes:
        mixtures: of the seen users, (u, k).
        prior: of a new user.
    """

    mixtures: torch.Tensor
    prior: Gaussian

    @property
    def generic(self) -> torch.Tensor:
        """The population's own mixture, (k,)."""
        return self.mixtures.mean(0)


class Method(Protocol):
    """A way from support comparisons to mixtures."""

    def __call__(self, support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:
        """Return a mixture for each of the support's users, (u, k); what is said of users without comparisons is unused.

        Args:
            support: the users' comparisons.
            population: the seen users.
            seed: of a method that draws.
        """


def describe_population(
    head: TrainedHead, train: PreferenceData, val: PreferenceData
) -> tuple[Population, Posteriors, torch.Tensor]:
    """Return the population of a trained head, its users' posteriors at their trained weights, and their counts.

    Args:
        head: on the device of the data.
        train: its training comparisons, users numbered as the head's.
        val: comparisons of the same users that it was not trained on.
    """
    answers = reduce_comparisons(head, train)
    prior = fit_prior(reduce_comparisons(head, val))
    z = coordinates(head.parameters["user.logits"].to(answers.b.device))
    return (
        Population(head.mixtures.to(answers.b.device).double(), prior),
        posteriors_at(answers, prior, z),
        answers.counts,
    )


def adapt_users(
    support: ReducedComparisons, population: Population, method: MethodName = "map", *, seed: int = 0
) -> torch.Tensor:
    """Return a mixture for each of the support's users, (u, k) float64.

    Raises:
        InputError: the head has one prototype, so that there is nothing to adapt, or the method is unknown.
    """
    refuse_one_prototype(support.k)
    if method not in METHODS:
        raise InputError(f"Got the method {method!r}; expected one of {', '.join(METHODS)}.")
    with torch.no_grad():
        mixtures = METHODS[method](support, population, seed=seed)
    return torch.where((support.counts > 0)[:, None], mixtures, population.generic)


def refuse_one_prototype(k: int) -> None:
    """Raise InputError for a head with k = 1."""
    if k == 1:
        raise InputError(
            "The head has k = 1 prototype, one reward for all users, so there is nothing to adapt; train one with "
            "palcache train-head --k 2 or more."
        )


def posteriors_of(support: ReducedComparisons, population: Population, mixtures: torch.Tensor) -> Posteriors:
    """Return the posteriors around given mixtures, (u, k): the uncertainty of what any method found."""
    logits = mixtures.clamp_min(SMALLEST).log() * support.temperature
    return posteriors_at(support, population.prior, coordinates(logits))


def _map(support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:  # noqa: ARG001
    """Maximum a posteriori under the population's prior."""
    return maximum_a_posteriori(support, population.prior).mixtures


def _generic(support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:  # noqa: ARG001
    """The population's own mixture for everyone."""
    return population.generic.expand(len(support.users), -1)


def _likelihood(support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:  # noqa: ARG001
    """The seen users' mixtures, averaged by the probability of the support under each: sum_s p(s | support) w_s."""
    seen, k = population.mixtures, support.k
    total = torch.zeros(len(support.users), len(seen), dtype=support.b.dtype, device=support.b.device)
    for rows in torch.split(torch.arange(len(support), device=support.b.device), max(1, _CELLS // (len(seen) * k))):
        margins = _by_mixture(support.b[rows], support.grams[support.prompt[rows]], seen)
        target = ((support.y[rows] + 1) / 2).unsqueeze(1)
        total.index_add_(0, support.user[rows], margins * target - F.softplus(margins))
    return torch.softmax(total, dim=1) @ seen


def _by_mixture(b: torch.Tensor, grams: torch.Tensor, mixtures: torch.Tensor) -> torch.Tensor:
    """Return margins of each comparison under each mixture: (n, k), (n, k, k), (m, k) -> (n, m)."""
    outer = mixtures.unsqueeze(2) * mixtures.unsqueeze(1)
    square = grams.flatten(1) @ outer.flatten(1).T
    return (b @ mixtures.T) / square.clamp_min(MIN_NORM**2).sqrt()


@final
@dataclass(frozen=True, slots=True)
class Published:
    """The published recipe: W from N(0, 1), then AdamW on W alone, everything else frozen (no prior).

    Attributes:
        lr: learning rate (5e-3; weight decay 0).
        epochs: passes over a user's comparisons.
        batch_size: comparisons per step, all of one user.
    """

    lr: float = 5e-3
    epochs: int = 20
    batch_size: int = 4

    def __call__(self, support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Return the mixtures after training; all users are stepped at once, each by its own comparisons."""
        weights = _normal_draws(support.users, support.k, seed).to(support.b)
        cells = _CELLS // support.k**2
        for users, rows in padded(support.user, support.counts, cells=cells):
            weights[users] = self._train(support, rows, weights[users], seed)
        return softmax_mixtures(weights, support.temperature)

    def _train(self, support: ReducedComparisons, rows: torch.Tensor, start: torch.Tensor, seed: int) -> torch.Tensor:
        w, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
        count = (rows >= 0).sum(1, keepdim=True)
        steps = torch.zeros_like(count)
        for epoch in range(self.epochs):
            order = _order(rows, np.random.SeedSequence([seed, epoch]))
            for batch in torch.split(order, self.batch_size, dim=1):
                active = (batch >= 0).any(1, keepdim=True)
                gradient = _gradient(support, batch, w)
                steps = steps + active
                first = torch.where(active, 0.9 * first + 0.1 * gradient, first)
                second = torch.where(active, 0.999 * second + 0.001 * gradient**2, second)
                unbiased = (second / (1 - 0.999 ** steps.clamp_min(1))).sqrt() + 1e-8
                moved = w - self.lr * first / (1 - 0.9 ** steps.clamp_min(1)) / unbiased
                w = torch.where(active, moved, w)
        return w


def _gradient(support: ReducedComparisons, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the gradient of each user's mean cross-entropy over rows, (c, s) padded by -1, in its weights, (c, k)."""
    kept = rows.clamp_min(0)
    basis = contrasts(support.k).to(weights)
    grams = support.grams[support.prompt[kept]]
    margins, slopes = margins_and_slopes(support.b[kept], grams, (weights @ basis).unsqueeze(1), support.temperature)
    residual = (torch.sigmoid(margins) - (support.y[kept] + 1) / 2) * (rows >= 0)
    mean = (residual.unsqueeze(-1) * slopes).sum(1) / (rows >= 0).sum(1, keepdim=True).clamp_min(1)
    return mean @ basis.T


def _order(rows: torch.Tensor, seed: np.random.SeedSequence) -> torch.Tensor:
    """Return the rows of each user in a seeded order that does not depend on the padding, -1 last."""
    # The key of slot j is the j-th number of one stream, so a longer padding changes no earlier key.
    keys = torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).random(rows.shape[1])).to(rows.device)
    at = torch.argsort(torch.where(rows >= 0, keys, 2.0), dim=1, stable=True)
    return torch.gather(rows, 1, at)


def _normal_draws(users: tuple[str, ...], k: int, seed: int) -> torch.Tensor:
    """Return N(0, 1) numbers that depend on the user's id and the seed alone, (u, k)."""
    keys = text_keys(pa.array(users, pa.large_string())).view("<u4").reshape(-1, 4).tolist()
    draws = [
        np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *key]))).standard_normal(k) for key in keys
    ]
    return torch.from_numpy(np.stack(draws) if draws else np.empty((0, k)))


METHODS: Final[Mapping[str, Method]] = {
    "map": _map,
    "published": Published(),
    "likelihood": _likelihood,
    "generic": _generic,
}
"""Every method by its name on the command line."""
