"""The five scores: how near an item is to an ideal point, as a reward (higher is better).

| score | reward | published with |
|---|---|---|
| `dist` | `-|x - a|` | hinge |
| `dist_normalized` | `-|x/|x| - a/|a||` | hinge |
| `dist_logistic` | `-s |x - a|` | logistic |
| `angle` | `s cos(x, a)` | cross-entropy over the two rewards |
| `angle_hinge` | `s cos(x, a)` | hinge |

`s = exp(logit_scale)`, at most 100, is trained for `dist_logistic` and `angle`. (Chen et al., ICLR 2025; the published
implementation has the opposite sign for `dist_logistic` and normalises along the tokens for `dist_normalized`.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F

from palcache.choices import Score
from palcache.losses import exactly

MAX_SCALE: Final = 100.0
"""The published clamp of exp(logit_scale)."""
INITIAL_SCALE: Final = 1 / 0.07
"""The published start of exp(logit_scale)."""
SCALED: Final = frozenset({"dist_logistic", "angle"})
"""Scores whose scale is trained."""
_COSINES: Final = frozenset({"angle", "angle_hinge"})


def initial_scale() -> torch.Tensor:
    """Return the logit_scale to start from, ()."""
    return torch.tensor(math.log(INITIAL_SCALE))


def scale(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return exp(logit_scale), at most 100, ()."""
    logit = parameters["logit_scale"]
    return exactly(logit).exp().to(logit.dtype).clamp(max=MAX_SCALE)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Return vectors of norm 1 along the last axis; a zero vector stays zero and has a finite gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def prepare(score: Score, x: torch.Tensor) -> torch.Tensor:
    """Return points as a score compares them: of norm 1, save for plain distances."""
    return x if score in {"dist", "dist_logistic"} else unit(x)


def rewards(score: Score, item: torch.Tensor, ideal: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Return the reward of each item, (...,).

    Args:
        score: which.
        item: prepared items, (..., p).
        ideal: prepared ideal points, (..., p).
        s: exp(logit_scale), ().
    """
    if score in _COSINES:
        return s * (item * ideal).sum(-1)
    distance: torch.Tensor = torch.linalg.vector_norm(item - ideal, dim=-1)
    return -s * distance if score == "dist_logistic" else -distance


def margins(
    score: Score, left: torch.Tensor, right: torch.Tensor, ideal: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """Return r(right) - r(left), (...,); arguments as for `rewards`."""
    if score in _COSINES:  # one product instead of two
        return s * ((right - left) * ideal).sum(-1)
    return rewards(score, right, ideal, s) - rewards(score, left, ideal, s)


def lookup(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows by their number, (m, ...) at (n,) -> (n, ...), with a quick gradient."""
    return F.embedding(index, rows)
