"""Scores rank a nearer item first, and are finite where vectors vanish."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.choices import LOSS_OF, Score
from palcache.heads.scores import margins, prepare, rewards, unit
from palcache.losses import pairwise_loss

SCORES: tuple[Score, ...] = get_args(Score)
S = torch.tensor(3.0)


def score_of(score: Score, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return rewards(score, prepare(score, x), prepare(score, a), S)


def numpy_score(score: Score, x: np.ndarray, a: np.ndarray) -> float:
    lengths = np.linalg.norm(x), np.linalg.norm(a)
    if score in {"angle", "angle_hinge"}:
        return float(3 * (x @ a) / (lengths[0] * lengths[1]))
    if score == "dist_normalized":
        return -float(np.linalg.norm(x / lengths[0] - a / lengths[1]))
    return -float(np.linalg.norm(x - a)) * (3 if score == "dist_logistic" else 1)


@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=30, deadline=None)
@given(p=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_scores_against_numpy(score: Score, p: int, seed: int) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    x, z, a = random.normal(size=(3, p))
    left, right, ideal = (prepare(score, torch.from_numpy(v)) for v in (x, z, a))
    scale = torch.tensor(3.0, dtype=torch.float64)
    assert float(rewards(score, left, ideal, scale)) == pytest.approx(numpy_score(score, x, a), rel=1e-12, abs=1e-12)
    want = numpy_score(score, z, a) - numpy_score(score, x, a)
    assert float(margins(score, left, right, ideal, scale)) == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_the_nearer_item_is_preferred(score: Score) -> None:
    ideal = torch.tensor([1.0, 2.0, -1.0, 0.5])
    near, far = ideal + 0.1, -ideal + 0.3
    assert score_of(score, near, ideal) > score_of(score, far, ideal)
    left, right = prepare(score, far), prepare(score, near)
    margin = margins(score, left, right, prepare(score, ideal), S)
    assert margin > 0, "response_2 is nearer, so the margin predicts y = +1"
    right_answer, wrong_answer = (pairwise_loss(LOSS_OF[score], margin, torch.tensor(y)) for y in (1.0, -1.0))
    assert right_answer < wrong_answer


@pytest.mark.parametrize("score", SCORES)
def test_a_flipped_sign_fails(score: Score) -> None:
    """Negative control: the same check with distances for rewards prefers the farther item."""
    ideal = torch.tensor([1.0, 2.0, -1.0, 0.5])
    flipped = [-score_of(score, item, ideal) for item in (ideal + 0.1, -ideal + 0.3)]
    assert not flipped[0] > flipped[1]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("zero", ["item", "ideal", "both"])
def test_zero_vectors(score: Score, zero: str) -> None:
    item = torch.zeros(3) if zero != "ideal" else torch.tensor([1.0, 0.0, 2.0])
    ideal = torch.zeros(3) if zero != "item" else torch.tensor([1.0, 0.0, 2.0])
    item.requires_grad_()
    ideal.requires_grad_()
    reward = score_of(score, item, ideal)
    reward.backward()  # type: ignore[no-untyped-call]
    if score in {"angle", "angle_hinge"}:
        assert float(reward.detach()) == 0
    for x in (item, ideal):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() < 10, "no gradient explodes beside a zero vector"


def test_unit_vectors() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.ones(4))
    assert not unit(torch.zeros(2, 3)).any()
