"""Losses and their gradients against float64 numpy, over shapes; defined results at the edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from palcache.choices import Loss, TokenWeighting
from palcache.losses import (
    norm_bound,
    pairwise_loss,
    position_weights,
    reduce_loss,
    token_losses,
    user_weights,
)

Array = npt.NDArray[np.float64]
LOSSES: tuple[Loss, ...] = get_args(Loss)
WEIGHTINGS: tuple[TokenWeighting, ...] = get_args(TokenWeighting)


def _smooth(t: float) -> float:
    return 0.5 / 5 * max(0.0, 1 - t) ** 2 if t >= 1 - 5 else 1 - 0.5 * 5 - t


def _smooth_slope(t: float) -> float:
    return -max(0.0, 1 - t) / 5 if t >= 1 - 5 else -1.0


PHI: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "hinge": (lambda t: max(0.0, 1 - t), lambda t: -1.0 if t < 1 else 0.0),
    "smooth_hinge": (_smooth, _smooth_slope),
    "logistic": (lambda t: float(np.logaddexp(0, -t)), lambda t: -1 / (1 + np.exp(t))),
    "cross_entropy": (lambda t: float(np.log(1 + np.exp(-t))), lambda t: -1 / (1 + np.exp(t))),
}


def oracle(kind: str, margins: Array, y: Array) -> tuple[Array, Array]:
    """Return losses and slopes, one margin at a time; a tie is the mean of both answers."""
    phi, slope = PHI[kind]
    losses, slopes = np.zeros_like(margins), np.zeros_like(margins)
    for at in np.ndindex(margins.shape):
        sides = [float(y[at])] if y[at] else [-1.0, 1.0]
        margin = float(margins[at])
        losses[at] = np.mean([phi(side * margin) for side in sides])
        slopes[at] = np.mean([side * slope(side * margin) for side in sides])
    return losses, slopes


margins_of = hnp.arrays(
    np.float64, st.integers(1, 9), elements=st.floats(-30, 30).filter(lambda m: abs(abs(m) - 1) > 1e-6)
)


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=60, deadline=None)
@given(margins=margins_of, data=st.data())
def test_losses_and_gradients(kind: Loss, margins: Array, data: st.DataObject) -> None:
    y = np.array(data.draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=len(margins), max_size=len(margins))))
    m = torch.from_numpy(margins).requires_grad_()
    losses = pairwise_loss(kind, m, torch.from_numpy(y))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    want, slopes = oracle(kind, margins, y)
    beyond = 3e-9  # torch's softplus is the identity beyond 20, off by exp(-20)
    np.testing.assert_allclose(losses.detach().numpy(), want, rtol=1e-12, atol=beyond)
    assert m.grad is not None
    np.testing.assert_allclose(m.grad.numpy(), slopes, rtol=1e-9, atol=beyond)


def span_oracle(weighting: str, losses: Array, begin: int, end: int) -> float:
    inside = losses[begin : min(end, len(losses))]
    m = len(inside)
    if m == 0:
        return 0.0
    if weighting == "mean":
        return float(inside.mean())
    if weighting == "only_last":
        return float(inside[-1])
    return float(sum((i + 1) * inside[i] for i in range(m)) / (m * (m + 1) / 2))


def weights_of(weighting: TokenWeighting, t: int, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return the weights of all of t positions, (n, t) float64."""
    count = (end.clamp(max=t) - begin).clamp(min=0)
    rank = torch.arange(t) - begin.unsqueeze(-1) + 1
    return position_weights(weighting, rank, count.unsqueeze(-1).expand_as(rank), torch.float64)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), t=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_token_losses(kind: Loss, weighting: TokenWeighting, n: int, t: int, seed: int) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    margins = random.normal(size=(n, t)) * 3
    y = random.choice([-1.0, 1.0], n)
    begin, end = random.integers(0, t + 1, n), random.integers(0, t + 2, n)
    m = torch.from_numpy(margins).requires_grad_()
    weights = weights_of(weighting, t, torch.from_numpy(begin), torch.from_numpy(end))
    flat = token_losses(kind, m.flatten(), torch.from_numpy(y).repeat_interleave(t), weights.flatten())
    got = flat.reshape(n, t).sum(-1)
    got.sum().backward()  # type: ignore[no-untyped-call]
    want, slopes = oracle(kind, margins, np.repeat(y[:, None], t, 1))
    for i in range(n):
        assert float(got[i].detach()) == pytest.approx(
            span_oracle(weighting, want[i], begin[i], end[i]), rel=1e-12, abs=1e-12
        )
        assert m.grad is not None
        for at in range(t):
            alone = np.zeros(t)
            alone[at] = slopes[i, at]
            assert float(m.grad[i, at]) == pytest.approx(span_oracle(weighting, alone, begin[i], end[i]), abs=1e-10)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_an_empty_span_counts_nothing(weighting: TokenWeighting) -> None:
    margins = torch.full((12,), float("nan"), requires_grad=True)
    weights = weights_of(weighting, 4, torch.tensor([2, 4, 3]), torch.tensor([2, 9, 1])).float()
    losses = token_losses("hinge", margins, torch.ones(12), weights.flatten())
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert not losses.any()
    assert margins.grad is not None
    assert not margins.grad.any()


def test_weights_of_positions() -> None:
    begin, end = torch.tensor([1, 0]), torch.tensor([4, 2])
    assert weights_of("cumulative", 5, begin, end)[0].tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 0])
    assert weights_of("only_last", 5, begin, end).tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert weights_of("mean", 5, begin, end).tolist() == [[0, *[pytest.approx(1 / 3)] * 3, 0], [0.5, 0.5, 0, 0, 0]]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_every_user_counts_the_same(users: list[int]) -> None:
    counts = torch.bincount(torch.tensor(users), minlength=5)
    weights = user_weights(torch.tensor(users), counts)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    present = sorted(set(users))
    for user in present:
        share = sum(float(w) for w, u in zip(weights, users, strict=True) if u == user)
        assert share == pytest.approx(1 / len(present), abs=1e-6)


def test_one_user_with_one_comparison() -> None:
    weights = user_weights(torch.tensor([3]), torch.tensor([0, 9, 9, 1]))
    assert weights.tolist() == [1]
    assert reduce_loss(torch.tensor([0.7]), weights) == pytest.approx(0.7)


def test_bound_of_norms() -> None:
    points = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    bound = norm_bound(points, 2.0)
    bound.backward()  # type: ignore[no-untyped-call]
    assert float(bound.detach()) == pytest.approx(3)
    assert points.grad is not None
    assert points.grad.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [0, 0]]


def test_a_wrong_sign_is_seen() -> None:
    """Negative control: with the margin's sign flipped, the oracle no longer agrees."""
    margins, y = np.array([0.3, -2.0, 0.8]), np.array([1.0, 1.0, -1.0])
    for kind in LOSSES:
        flipped: Any = pairwise_loss(kind, -torch.from_numpy(margins), torch.from_numpy(y))
        assert not np.allclose(flipped.numpy(), oracle(kind, margins, y)[0])
