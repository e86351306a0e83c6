"""Jets: a reward with its first and second derivatives in the two numbers through which it depends on an ideal point.

Whatever d and p are, the reward of an item x at an ideal point a is a function of `t = <x, a>`, of `q = |a|^2` and of the
item's own `n = |x|^2` (of unit items for `cosine` and `unit_distance`):

| kind | reward | scores of heads |
|---|---|---|
| `linear` | `t` | low-rank |
| `cosine` | `t / sqrt(q)` | `angle`, `angle_hinge` |
| `distance` | `-sqrt(n - 2 t + q)` | `dist`, `dist_logistic` |
| `unit_distance` | `-sqrt(n + 1 - 2 t / sqrt(q))` | `dist_normalized` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

import torch

Kind = Literal["linear", "cosine", "distance", "unit_distance"]
ONE_SIDED: Final = frozenset({"linear", "cosine"})
"""Kinds that are linear in t, so that a comparison needs the difference of its items alone."""
MIN_NORM: Final = 1e-12
"""A norm or a distance below this counts as this, as in `torch.nn.functional.normalize`."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Jet:
    """A reward and its derivatives in t and q, of one shape."""

    value: torch.Tensor
    t: torch.Tensor
    q: torch.Tensor
    tt: torch.Tensor
    tq: torch.Tensor
    qq: torch.Tensor


def reward(kind: Kind, t: torch.Tensor, q: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Return the reward; t, q and n broadcast."""
    if kind == "linear":
        return t
    if kind == "distance":
        return -_root(n - 2 * t + q)
    cosine = t / _root(q)
    return cosine if kind == "cosine" else -_root(n + 1 - 2 * cosine)


def jet(kind: Kind, t: torch.Tensor, q: torch.Tensor, n: torch.Tensor) -> Jet:
    """Return the reward with its derivatives; t, q and n broadcast."""
    zero = torch.zeros_like(t + q)
    if kind == "linear":
        return Jet(t + zero, zero + 1, zero, zero, zero, zero)
    if kind == "distance":
        return _minus_root(Jet(n - 2 * t + q, zero - 2, zero + 1, zero, zero, zero))
    root = _root(q) + zero
    cube = root**3
    cosine = Jet(t / root, 1 / root, -t / (2 * cube), zero, -1 / (2 * cube), 3 * t / (4 * cube * root**2))
    if kind == "cosine":
        return cosine
    parts = (-2 * part for part in (cosine.t, cosine.q, cosine.tt, cosine.tq, cosine.qq))
    return _minus_root(Jet(n + 1 - 2 * cosine.value, *parts))


def _minus_root(e: Jet) -> Jet:
    """Return the jet of -sqrt(e) by the chain rule."""
    root = _root(e.value)
    first, second = -1 / (2 * root), 1 / (4 * root**3)
    return Jet(
        -root,
        first * e.t,
        first * e.q,
        first * e.tt + second * e.t**2,
        first * e.tq + second * e.t * e.q,
        first * e.qq + second * e.q**2,
    )


def _root(square: torch.Tensor) -> torch.Tensor:
    return square.clamp_min(MIN_NORM**2).sqrt()
