"""Reduced comparisons give the head's own margins, whatever d and p are, for every head that users are adapted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from palcache.checkpoints import TrainedHead
from palcache.configs import HeadConfig
from palcache.errors import InputError
from palcache.heads import BradleyTerry, LowRank, PalA, PalB, PerUser, build_head
from palcache.tensors import PreferenceData, TensorTable
from palcache.users.padded_users import PaddedUsers
from palcache.users.posteriors import Objective
from palcache.users.reductions import ReducedComparisons, is_reducible, reduce_comparisons, require_reducible
from tests.planted import standard_prior

D, P, K, PROMPTS, RESPONSES, N, U = 7, 5, 3, 11, 13, 101, 4
SCORES = ("dist", "dist_normalized", "dist_logistic", "angle", "angle_hinge")
FORMS = ("f(Pw)", "f(P)w", "Pw", "|f(P)|w")
HEADS: Mapping[str, Mapping[str, Any]] = {
    **{f"pal-b {score}": {"score": score} for score in SCORES},
    **{
        f"pal-a {form} {score}": {"head": "pal-a", "user_form": form, "score": score}
        for form in FORMS
        for score in ("dist", "dist_normalized", "dist_logistic", "angle")
    },
    "pal-a gelu": {"head": "pal-a", "projector": "mlp2-gelu-dropout1"},
    "pal-a batchnorm": {"head": "pal-a", "projector": "mlp2-relu-dropout1-batchnorm"},
    "pal-b warm": {"temperature": 0.7, "mixture": "gumbel"},
    "low-rank": {"head": "low-rank"},
}


def data() -> PreferenceData:
    generator = torch.Generator().manual_seed(1)

    def numbers(high: int) -> torch.Tensor:
        return torch.randint(high, (N,), generator=generator)

    left = numbers(RESPONSES)
    return PreferenceData(
        prompts=TensorTable(torch.randn(PROMPTS + 2, D, generator=generator)),
        responses=TensorTable(torch.randn(RESPONSES + 3, D, generator=generator)),
        prompt=numbers(PROMPTS) + 1,
        response_1=left,
        response_2=(left + 1 + numbers(RESPONSES - 1)) % RESPONSES,
        user=numbers(U),
        y=numbers(2).float() * 2 - 1,
        users=tuple(f"u.{i}" for i in range(U)),
    )


def head_of(name: str) -> TrainedHead:
    """Return a head with prototypes and users that are unlike one another."""
    config = HeadConfig(**{"k": K, "p": P, "projector": "mlp1-relu-dropout1", **HEADS[name]})
    shape = build_head(config, d=D, users=U)
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in shape.initial(generator).items()
    }
    parameters |= {key: value.abs() for key, value in parameters.items() if key.endswith("norm.var")}
    parameters["user.logits"] = torch.randn(U, K, generator=generator)
    return TrainedHead(shape, parameters, tuple(f"u.{i}" for i in range(U)), {})


def reduced_of(name: str) -> ReducedComparisons:
    return reduce_comparisons(head_of(name), data())


@pytest.mark.parametrize("name", HEADS)
def test_margins_are_the_heads(name: str) -> None:
    head, pairs = head_of(name), data()
    reduced = reduce_comparisons(head, pairs)
    wide = {key: v.double() if v.is_floating_point() else v for key, v in head.parameters.items()}
    prompts, responses = (
        TensorTable(table.take(torch.arange(len(table))).double()) for table in (pairs.prompts, pairs.responses)
    )
    batch = replace(pairs, prompts=prompts, responses=responses).batch(torch.arange(N))
    expected = head.shape.margins(wide, batch)
    torch.testing.assert_close(reduced.margins(head.mixtures), expected, rtol=2e-5, atol=2e-5)
    at = reduced.margins_at(head.mixtures)
    torch.testing.assert_close(at[torch.arange(N), reduced.user], reduced.margins(head.mixtures))
    assert reduced.counts.tolist() == np.bincount(pairs.user.numpy(), minlength=U).tolist()
    projected = "f(Pw)" in name or name in {"pal-a gelu", "pal-a batchnorm"}
    assert reduced.width == (P if projected else K)
    assert reduced.grams.shape[0] == (len(torch.unique(pairs.prompt)) if name.startswith("pal-b") else 1)


@pytest.mark.parametrize("name", HEADS)
def test_gradient_and_hessian_are_autograds(name: str) -> None:
    """Of the negative log-posterior, padding and a shared Gram matrix included; and margins at a point are margins."""
    reduced, rows = reduced_of(name), torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]])
    objective = Objective.of(reduced, rows, standard_prior(K))
    z = torch.randn(2, K - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = objective.expand(z)
    torch.testing.assert_close(objective.values(z.unsqueeze(1))[:, 0], found.loss)
    for user in range(2):
        one = objective.take(torch.tensor([user]))

        def loss(point: torch.Tensor, one: Objective = one) -> torch.Tensor:
            return one.values(point[None, None])[0, 0]

        torch.testing.assert_close(found.gradient[user], torch.autograd.functional.jacobian(loss, z[user]))  # type: ignore[no-untyped-call]
        torch.testing.assert_close(found.observed[user], torch.autograd.functional.hessian(loss, z[user]))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["pal-b angle", "pal-b dist", "pal-a f(Pw) dist", "low-rank"])
def test_slopes_are_differences_of_margins(name: str) -> None:
    users = PaddedUsers.gather(reduced_of(name), torch.arange(12).reshape(2, 6))
    z = torch.randn(2, K - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for j in range(K - 1):
        step = torch.zeros(K - 1, dtype=torch.float64)
        step[j] = 1e-5
        sides = users.margins_at(torch.stack([z - step, z + step], dim=1))
        torch.testing.assert_close(
            users.around(z).slopes[..., j], (sides[..., 1] - sides[..., 0]) / 2e-5, rtol=1e-5, atol=1e-7
        )


def test_noise_divides_margins() -> None:
    reduced, mixtures = reduced_of("pal-b dist_normalized"), head_of("pal-b angle").mixtures
    torch.testing.assert_close(reduced.calibrated(0.25).margins(mixtures), 4 * reduced.margins(mixtures))


def test_nothing_is_reduced_to_nothing() -> None:
    for name in ("pal-b angle", "pal-a f(Pw) dist", "low-rank"):
        reduced = reduce_comparisons(head_of(name), data().take(np.empty(0, np.int64)))
        assert len(reduced) == 0
        assert reduced.counts.tolist() == [0] * U


def test_which_heads_are_reduced() -> None:
    assert is_reducible(PalB(D, P, K, U, "identity", 1.0, score="dist"))
    assert is_reducible(LowRank(D, K, U))
    for shape, described in (
        (LowRank(D, K, U, weights="free"), "low-rank, free"),
        (PalA(D, P, K, U, "identity", 1.0, mixture="partition"), "pal-a, partition"),
        (BradleyTerry(D, D, U, "identity"), "bradley-terry"),
        (PerUser(D, U), "per-user"),
    ):
        assert not is_reducible(shape)
        with pytest.raises(InputError, match=rf"This head \({described}\) has no users to adapt: expected mixtures"):
            require_reducible(shape)
