"""Adaptation: new users on a frozen head from a handful of comparisons; only their mixtures are estimated.

Every method has one interface, works on reduced comparisons (`palcache.users.reductions`) for all users at once, and gives each
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
from palcache.losses import pairwise_loss
from palcache.tensors import PreferenceData
from palcache.users.padded_users import PaddedUsers, contrasts, coordinates, padded, row_cells
from palcache.users.posteriors import Gaussian, Posteriors, maximum_a_posteriori, posteriors_at
from palcache.users.priors import fit_noise, fit_prior
from palcache.users.reductions import ReducedComparisons, reduce_comparisons

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
        noise: what the head's margins are divided by, so that an answer has the probability sigmoid(margin).
    """

    mixtures: torch.Tensor
    prior: Gaussian
    noise: float = 1.0

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
    answers, held_out = reduce_comparisons(head, train), reduce_comparisons(head, val)
    mixtures = head.mixtures.to(answers.device).double()
    noise = fit_noise(held_out, mixtures)
    prior = fit_prior(held_out.calibrated(noise))
    z = coordinates(head.parameters["user.logits"].to(answers.device))
    return Population(mixtures, prior, noise), posteriors_at(answers.calibrated(noise), prior, z), answers.counts


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
    return posteriors_at(support.calibrated(population.noise), population.prior, coordinates(logits))


def _map(support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:  # noqa: ARG001
    """Maximum a posteriori under the population's prior."""
    return maximum_a_posteriori(support.calibrated(population.noise), population.prior).mixtures


def _generic(support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:  # noqa: ARG001
    """The population's own mixture for everyone."""
    return population.generic.expand(len(support.users), -1)


def _likelihood(support: ReducedComparisons, population: Population, *, seed: int = 0) -> torch.Tensor:  # noqa: ARG001
    """The seen users' mixtures, averaged by the probability of the support under each: sum_s p(s | support) w_s."""
    seen, support = population.mixtures, support.calibrated(population.noise)
    size = max(1, _CELLS // (len(seen) * 2 + row_cells(support)))
    total = support.products.new_zeros(len(support.users), len(seen))
    for rows in torch.split(torch.arange(len(support), device=support.device), size):
        part = support.take(rows)
        margins = part.margins_at(seen)
        total.index_add_(0, part.user, margins * ((part.y + 1) / 2).unsqueeze(1) - F.softplus(margins))
    return torch.softmax(total, dim=1) @ seen


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
        weights = _normal_draws(support.users, support.k, seed).to(support.products)
        cells = _CELLS // row_cells(support)
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
    """Return the gradient of each user's mean loss over rows, (c, s) padded by -1, in its weights, (c, k)."""
    users, basis = PaddedUsers.gather(support, rows), contrasts(support.k).to(weights)
    local = users.around(weights @ basis)
    with torch.enable_grad():
        margins = local.margins.requires_grad_()
        losses = pairwise_loss(support.loss, margins, users.y) * users.inside
        (pull,) = torch.autograd.grad(losses.sum(), margins)
    mean = (pull.unsqueeze(1) @ local.slopes).squeeze(1) / users.inside.sum(1, keepdim=True).clamp_min(1)
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
