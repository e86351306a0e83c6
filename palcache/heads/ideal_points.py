"""What PAL-A and PAL-B share: projected items, a batch's mixtures, and scores against ideal points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Final

import torch

from palcache.choices import LOSS_OF, Loss, Mixture, Score
from palcache.heads.mixtures import mix
from palcache.heads.projectors import Parameters, Projector
from palcache.heads.scores import SCALED, lookup, margins, prepare, rewards, scale
from palcache.noises import Noise, RowNoise, Site
from palcache.tensors import PairBatch

SPREAD: Final = 0.1
"""Size of the prototypes' initial differences, as a share of an ordinary initialisation."""


class IdealPointShape(ABC):
    """Base of the shapes of heads whose reward compares projected items with a user's ideal point.

    Abstract: a shape is a frozen dataclass with these fields among its own, and adds `initial` and how prompts and mixtures
    make ideal points.

    Attributes:
        score: how an item and an ideal point make a reward.
        mixture: how user weights become a point of the simplex.
        temperature: of the softmax over user weights.
    """

    __slots__ = ()
    score: Score
    mixture: Mixture
    temperature: float

    @property
    @abstractmethod
    def items(self) -> Projector:
        """f, of items."""

    @property
    def closed_form(self) -> bool:
        """It is trained step by step."""
        return False

    @property
    def loss(self) -> Loss:
        """The loss that its score was published with."""
        return LOSS_OF[self.score]

    def trains(self, name: str) -> bool:
        """Return whether training changes a parameter: the scale is fixed for some scores."""
        return name != "logit_scale" or self.score in SCALED

    def mixtures(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return every user's mixture in evaluation, (u, k)."""
        return mix(self.mixture, parameters["user.logits"], self.temperature)

    def project_responses(
        self,
        parameters: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        noise: RowNoise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return f of the vectors of responses, or of prompt and response together, (..., d) -> (..., p)."""
        return project(self.items, "f.", parameters, x, noise, updates)

    def margins(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return r(response_2) - r(response_1), (n,), or (m,); positive predicts y = +1.

        Args:
            parameters: as `initial` draws them.
            batch: the comparisons; prompts are not read where response vectors are of prompt and response together.
            mixtures: one mixture per comparison, (n, k); None takes the head's own users.
            noise: dropout and Gumbel noise of a training step; None in evaluation.
            updates: receives new running statistics in training; None in evaluation.
        """
        left, right, ideal = self.points(parameters, batch, mixtures=mixtures, noise=noise, updates=updates)
        return self.compare(parameters, left, right, per_pair(ideal, batch))

    def rewards(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return r(response_1) and r(response_2), (n, 2), or (m, 2); arguments as for `margins`."""
        left, right, ideal = self.points(parameters, batch, mixtures=mixtures, noise=noise, updates=updates)
        ideal, s = prepare(self.score, per_pair(ideal, batch)), scale(parameters)
        return torch.stack([rewards(self.score, left, ideal, s), rewards(self.score, right, ideal, s)], dim=-1)

    def points(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return items as the score compares them, left and right, and ideal points as they are, (n, p) each.

        Of comparisons with several pairs of rows, items are (m, p), and ideal points too where each pair has a prompt row
        of its own.
        """
        if mixtures is None:
            logits = parameters["user.logits"]
            mixtures = batch_mixtures(self.mixture, logits, batch.user, self.temperature, noise, updates)
        left, right = project_items(self.items, self.score, parameters, batch, noise, updates)
        return left, right, self.batch_ideals(parameters, batch, mixtures, noise, updates)

    @abstractmethod
    def batch_ideals(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        mixtures: torch.Tensor,
        noise: Noise | None,
        updates: Parameters | None,
    ) -> torch.Tensor:
        """Return the ideal points of a batch with one mixture per comparison, as `points` does."""

    def compare(
        self,
        parameters: Mapping[str, torch.Tensor],
        left: torch.Tensor,
        right: torch.Tensor,
        ideal: torch.Tensor,
    ) -> torch.Tensor:
        """Return r(right) - r(left) of what `points` returned, (...,)."""
        return margins(self.score, left, right, prepare(self.score, ideal), scale(parameters))


def project(
    projector: Projector,
    prefix: str,
    parameters: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    noise: RowNoise | None = None,
    updates: Parameters | None = None,
) -> torch.Tensor:
    """Return a projector's image of rows, (m, d) -> (m, p) or (copies, m, p).

    Its parameters stand under `prefix`; running statistics go on from those in `updates`, so that several calls in one
    pass follow each other.
    """
    own = part(parameters, prefix)
    if updates is None or not projector.batchnorm:
        return projector(own, x, noise)
    found: Parameters = {}
    out = projector({**own, **part(updates, prefix)}, x, noise, found)
    updates.update({prefix + name: value for name, value in found.items()})
    return out


def row_noise(noise: Noise | None, site: Site, x: torch.Tensor, names: torch.Tensor | None) -> RowNoise | None:
    """Return the noise of rows x, (m, d); without names they are counted."""
    if noise is None:
        return None
    return noise.at(site, torch.arange(len(x), device=x.device) if names is None else names)


def part(parameters: Mapping[str, torch.Tensor], prefix: str) -> Parameters:
    """Return the parameters under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def project_items(
    projector: Projector,
    score: Score,
    parameters: Mapping[str, torch.Tensor],
    batch: PairBatch,
    noise: Noise | None,
    updates: Parameters | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both items of each pair of rows as the score compares them, (n, p), or (m, p) with several a comparison.

    Distinct rows are projected once, except where a batchnorm takes its statistics from them: then all left rows are,
    and after them all right rows, as published.
    """

    def image(x: torch.Tensor, names: torch.Tensor | None) -> torch.Tensor:
        return prepare(score, project(projector, "f.", parameters, x, row_noise(noise, "items", x, names), updates))

    names = batch.response_names
    if projector.batchnorm and updates is not None:
        sides = [(at, at if names is None else names[at]) for at in (batch.response_1, batch.response_2)]
        left, right = (image(batch.responses[at], named) for at, named in sides)
        return left, right
    items = image(batch.responses, names)
    return lookup(items, batch.response_1), lookup(items, batch.response_2)


def batch_mixtures(
    kind: Mixture,
    logits: torch.Tensor,
    user: torch.Tensor,
    temperature: float,
    noise: Noise | None,
    updates: Parameters | None,
) -> torch.Tensor:
    """Return the mixture of each comparison's user, (n, k); each comparison has Gumbel noise of its own."""
    training = noise is not None or updates is not None
    if kind in {"gumbel", "gumbel_hard"}:
        own = lookup(logits, user)
        return mix(kind, own, temperature, training=training, noise=row_noise(noise, "mixtures", own, None))
    return lookup(mix(kind, logits, temperature, training=training), user)


def per_pair(values: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """Return values of each pair of rows, (m, ...), where they are of each comparison, (n, ...)."""
    if batch.comparison is None or len(values) == len(batch.comparison):
        return values
    return lookup(values, batch.comparison)
