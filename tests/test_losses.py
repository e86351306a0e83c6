"""Losses and their gradients equal a float64 reference; ties count one half for each side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palcache.losses import cross_entropy

Floats = npt.NDArray[np.float64]


def reference(margins: Floats, y: Floats) -> Floats:
    """Return the cross-entropy over two rewards, 0 and the margin, with the share (y + 1) / 2 on the second."""
    log_p2 = -np.logaddexp(0, -margins)
    log_p1 = -np.logaddexp(0, margins)
    share = (y + 1) / 2
    out: Floats = -(share * log_p2 + (1 - share) * log_p1)
    return out


cases = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-60, 60), min_size=n, max_size=n),
        st.lists(st.sampled_from([-1, 0, 1]), min_size=n, max_size=n),
    )
)


@given(case=cases)
def test_losses_and_gradients_equal_the_reference(case: tuple[list[float], list[int]]) -> None:
    margins, y = np.array(case[0]), np.array(case[1], np.float64)
    leaf = torch.from_numpy(margins).requires_grad_()
    losses = cross_entropy(leaf, torch.from_numpy(y))
    np.testing.assert_allclose(losses.detach().numpy(), reference(margins, y), rtol=1e-9, atol=3e-9)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    probability = np.exp(-np.logaddexp(0, -margins))
    np.testing.assert_allclose(leaf.grad.numpy(), probability - (y + 1) / 2, rtol=1e-9, atol=3e-9)


@given(margin=st.floats(0.01, 50), y=st.sampled_from([-1.0, 1.0]))
def test_a_margin_of_the_answers_sign_costs_less_than_a_coin_and_the_other_more(margin: float, y: float) -> None:
    right, wrong = cross_entropy(
        torch.tensor([margin * y, -margin * y]).double(), torch.tensor([y, y]).double()
    ).tolist()
    assert right < np.log(2) < wrong


def test_no_margin_costs_one_coin() -> None:
    for y in (-1.0, 0.0, 1.0):
        assert float(cross_entropy(torch.zeros(1), torch.tensor([y]))) == pytest.approx(np.log(2))


def test_a_tie_costs_the_mean_of_both_answers_and_is_least_without_a_margin() -> None:
    margins = torch.linspace(-3, 3, 7)
    tie, left, right = (cross_entropy(margins, torch.full((7,), y)) for y in (0.0, -1.0, 1.0))
    torch.testing.assert_close(tie, (left + right) / 2)
    assert int(tie.argmin()) == 3


def test_huge_margins_stay_finite_in_float32() -> None:
    margins = torch.tensor([1e30, -1e30, 200.0, -200.0], requires_grad=True)
    losses = cross_entropy(margins, torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(losses).all())
    assert margins.grad is not None
    assert margins.grad.tolist() == [1.0, -1.0, 0.0, 0.0]


def test_leading_axes_stack() -> None:
    margins, y = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([-1.0, 0, 1, 1, -1])
    assert torch.equal(cross_entropy(margins, y)[2, 1], cross_entropy(margins[2, 1], y))
