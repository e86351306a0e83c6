"""Mixtures lie on the simplex and equal a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palcache.heads.mixtures import softmax_mixtures


@given(u=st.integers(1, 6), k=st.integers(1, 5), temperature=st.floats(0.05, 20), seed=st.integers(0, 99))
def test_mixtures_equal_the_reference(u: int, k: int, temperature: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(u, k)) * 3
    expected = np.exp(logits / temperature - (logits / temperature).max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    found = softmax_mixtures(torch.from_numpy(logits), temperature).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


def test_extreme_logits_pick_one_prototype() -> None:
    found = softmax_mixtures(torch.tensor([[1e4, -1e4, 0.0]]))
    assert found.tolist() == [[1.0, 0.0, 0.0]]


def test_a_low_temperature_sharpens() -> None:
    logits = torch.tensor([[0.3, 0.1, -0.2]])
    assert softmax_mixtures(logits, 0.1).max() > softmax_mixtures(logits).max() + 0.2


def test_a_leading_axis_stacks() -> None:
    logits = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    stacked = softmax_mixtures(logits, 0.5)
    assert stacked.shape == (4, 3, 2)
    assert torch.equal(stacked[2], softmax_mixtures(logits[2], 0.5))


@pytest.mark.parametrize("user", [0, 2])
def test_only_a_users_own_logits_move_its_mixture(user: int) -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    softmax_mixtures(logits)[user, 1].backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert [bool(row.any()) for row in logits.grad] == [row == user for row in range(3)]
