"""Mixtures are points of the simplex, with the modes of training and evaluation."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from palcache.choices import Mixture
from palcache.heads.mixtures import mix
from palcache.noises import Noise, RowNoise

KINDS: tuple[Mixture, ...] = get_args(Mixture)
LOGITS = torch.tensor([[0.2, 1.5, -0.3], [2.0, 2.0, 0.0]])


def drawn(seed: int, rows: int = len(LOGITS)) -> RowNoise:
    return Noise.of(seed).at("mixtures", torch.arange(rows))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_points_of_the_simplex(kind: Mixture, training: bool) -> None:
    out = mix(kind, LOGITS, 0.7, training=training, noise=drawn(1))
    assert (out >= 0).all()
    torch.testing.assert_close(out.sum(-1), torch.ones(2))


def test_partition() -> None:
    torch.testing.assert_close(mix("partition", LOGITS, 0.5, training=True), (LOGITS / 0.5).softmax(-1))
    assert mix("partition", LOGITS, 0.5).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_gumbel_draws_in_training_alone() -> None:
    first, again, other = (mix("gumbel", LOGITS, 1.0, training=True, noise=drawn(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(mix("gumbel", LOGITS, 1.0), LOGITS.softmax(-1))


def test_hard_gumbel_is_one_hot_with_a_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    out = mix("gumbel_hard", logits, 1.0, training=True, noise=drawn(3))
    assert sorted(out.detach().round(decimals=5).flatten().tolist()) == [0, 0, 0, 0, 1, 1]
    (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.any()


def test_gumbel_draws_have_the_probabilities_of_the_softmax() -> None:
    many = LOGITS[:1].expand(20_000, 3)
    mean = mix("gumbel_hard", many, 1.0, training=True, noise=drawn(5, 20_000)).mean(0)
    torch.testing.assert_close(mean, LOGITS[0].softmax(-1), atol=0.012, rtol=0)
