"""What training minimises: a head's margins through a loss, over comparisons or over the tokens of their spans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch

from palcache.choices import TokenWeighting
from palcache.configs import FitConfig
from palcache.heads.ideal_points import per_pair
from palcache.heads.projectors import Parameters
from palcache.heads.protocols import Head, IdealPointHead
from palcache.losses import (
    exactly,
    norm_bound,
    pairwise_loss,
    position_weights,
    reduce_loss,
    rounded_sum,
    token_losses,
    user_weights,
)
from palcache.noises import Noise
from palcache.tensors import PairBatch, PreferenceData
from palcache.token_batches import TokenBatch, TokenData

EVALUATION_ROWS: Final = 8_192
TOKEN_ROWS: Final = 256


TrainingData: TypeAlias = PreferenceData | TokenData
"""Comparisons with their vectors, pooled or of every token."""


@final
@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a head on batches, a pure function of the parameters.

    Attributes:
        shape: the head.
        config: loss, weightings, bound and precision.
        bound: weight and bound of norms that stand for those of the configuration, where heads of different ones are stacked.
    """

    shape: Head
    config: FitConfig
    bound: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch | TokenBatch,
        *,
        noise: Noise | None = None,
        updates: Parameters | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of a batch in a training pass, (): in nats per comparison where it is a likelihood.

        Args:
            parameters: of the head.
            batch: pooled comparisons, or comparisons with every token.
            noise: dropout and Gumbel noise of the step.
            updates: receives new running statistics; also without them it is an empty dictionary in training.
            counts: number of training comparisons of each user, (u,), where every user is to count the same.
        """
        with _precision(self.config, batch.y.device):
            margins, ideal = self._forward(parameters, _pairs(batch), noise, updates)
        margins = exactly(margins)
        weights = None if counts is None else user_weights(batch.user, counts).to(margins.dtype)
        losses = self._losses(margins, batch)
        if isinstance(batch, PairBatch):
            loss = reduce_loss(losses, weights)
        else:
            loss = losses.sum() / len(batch.y) if weights is None else (losses * weights[batch.comparison]).sum()
        if ideal is None:
            return loss
        rows = ideal.to(torch.promote_types(ideal.dtype, torch.float32)).reshape(-1, ideal.shape[-1])
        weight, bound = self.bound or (self.config.bound_weight, self.config.bound)
        return loss + weight * norm_bound(rows, bound)

    def _forward(
        self,
        parameters: Mapping[str, torch.Tensor],
        pairs: PairBatch,
        noise: Noise | None,
        updates: Parameters | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return margins, (n,) or (m,), and the ideal points where their norms are bounded."""
        options: dict[str, Any] = {"noise": noise, "updates": updates}
        shape = self.shape
        if not self.config.bound_weight:
            return shape.margins(parameters, pairs, **options), None
        assert isinstance(shape, IdealPointHead)  # noqa: S101 - `fit` refuses the others
        left, right, ideal = shape.points(parameters, pairs, **options)
        return shape.compare(parameters, left, right, per_pair(ideal, pairs)), ideal

    def _losses(self, margins: torch.Tensor, batch: PairBatch | TokenBatch) -> torch.Tensor:
        """Return the loss of each comparison, (n,), or the weighted loss of each token, (m,)."""
        kind = self.config.loss or self.shape.loss
        if isinstance(batch, PairBatch):
            return pairwise_loss(kind, margins, batch.y)
        weights = _weights(self.config.token_weighting or "mean", batch, margins)
        return token_losses(kind, margins, batch.y[batch.comparison], weights)

    @torch.no_grad()
    def validate(self, parameters: Mapping[str, torch.Tensor], data: TrainingData) -> tuple[float, float]:
        """Return mean loss and accuracy in evaluation; users whom the head does not know (-1) have the mean mixture.

        Of token data, accuracy is the mean over comparisons of the share of a span's tokens that are right, 0 for an
        empty span.
        """
        size = EVALUATION_ROWS if isinstance(data, PreferenceData) else TOKEN_ROWS
        found = [self.evaluate(parameters, batch) for batch in data.batches(size)]
        loss, right = (rounded_sum(torch.cat(parts)) / len(data) for parts in zip(*found, strict=True))
        return loss, right

    def evaluate(
        self, parameters: Mapping[str, torch.Tensor], batch: PairBatch | TokenBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each comparison and whether it is predicted right, (n,) each; users as for `validate`.

        Of token data, both are of each token, with its weight.
        """
        known = self.shape.mixtures(parameters)
        mixtures = torch.cat([known, known.mean(0, keepdim=True)])
        margins = exactly(self.shape.margins(parameters, _pairs(batch), mixtures=mixtures[batch.user]))
        return self._losses(margins, batch), _right(margins, batch)


def _pairs(batch: PairBatch | TokenBatch) -> PairBatch:
    return batch if isinstance(batch, PairBatch) else batch.pairs


def _weights(weighting: TokenWeighting, batch: TokenBatch, margins: torch.Tensor) -> torch.Tensor:
    return position_weights(weighting, batch.rank, batch.count[batch.comparison], margins.dtype)


def _right(margins: torch.Tensor, batch: PairBatch | TokenBatch) -> torch.Tensor:
    """Return which answers are predicted right, (n,); of tokens, (m,), as shares of their spans. Zero counts one half."""
    if isinstance(batch, PairBatch):
        return (1 + margins.sign() * batch.y.sign()) / 2
    right = (1 + margins.sign() * batch.y.sign()[batch.comparison]) / 2
    return right * _weights("mean", batch, margins)


@contextlib.contextmanager
def _precision(config: FitConfig, device: torch.device) -> Iterator[None]:
    """Run a forward pass in the configured precision; parameters and results stay as they are."""
    if config.precision == "float32":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
