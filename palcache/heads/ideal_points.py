"""What PAL-A and PAL-B share: projected items, a batch's mixtures, and scores against ideal points."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from palcache.choices import Mixture, Score
from palcache.heads.mixtures import mix
from palcache.heads.projectors import Parameters, Projector
from palcache.heads.scores import lookup, margins, prepare, rewards, scale
from palcache.noises import Noise, RowNoise, Site
from palcache.tensors import PairBatch


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


def compare(
    score: Score,
    parameters: Mapping[str, torch.Tensor],
    left: torch.Tensor,
    right: torch.Tensor,
    ideal: torch.Tensor,
) -> torch.Tensor:
    """Return r(right) - r(left) of prepared items against ideal points as they are, (...,)."""
    return margins(score, left, right, prepare(score, ideal), scale(parameters))


def both_rewards(
    score: Score,
    parameters: Mapping[str, torch.Tensor],
    left: torch.Tensor,
    right: torch.Tensor,
    ideal: torch.Tensor,
) -> torch.Tensor:
    """Return r(left) and r(right), (..., 2); arguments as for `compare`."""
    ideal, s = prepare(score, ideal), scale(parameters)
    return torch.stack([rewards(score, left, ideal, s), rewards(score, right, ideal, s)], dim=-1)
