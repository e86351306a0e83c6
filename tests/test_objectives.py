"""Training options: optimizers, schedules, weightings, bounds, precision, token losses, solved heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.token_loss import time_losses, time_steps
from palcache.configs import FitConfig, HeadConfig
from palcache.errors import InputError, NumericsError
from palcache.heads import IdealPointHead, build_head
from palcache.heads.projectors import is_buffer
from palcache.objectives import Objective
from palcache.tensors import TensorTable
from palcache.training import FitState, fit, validate
from tests.building import all_pairs, all_tokens, generator, make_data, make_token_data

SMALL: dict[str, Any] = {"k": 2, "p": 4, "projector": "mlp1-relu-dropout0"}


def shape_of(d: int = 7, users: int = 5, **options: Any) -> Any:
    return build_head(HeadConfig(**(SMALL | options)), d=d, users=users)


def test_every_user_counts_the_same() -> None:
    """Doubling one user's comparisons leaves the weighted loss as it is, and changes the plain one."""
    shape, data = shape_of(), make_data()
    parameters = shape.initial(generator(0))
    once = torch.arange(20)
    twice = torch.cat([once, once[data.user[once] == 0]])
    for weighting, same in (("users", True), ("comparisons", False)):
        objective = Objective(shape, FitConfig(weighting=weighting))  # type: ignore[arg-type]
        losses = []
        for rows in (once, twice):
            counts = torch.bincount(data.user[rows], minlength=5) if weighting == "users" else None
            losses.append(float(objective(parameters, data.batch(rows), counts=counts)))
        assert (abs(losses[0] - losses[1]) < 1e-6) == same


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["pal-a", "pal-b"])
def test_bound_of_ideal_points(kind: str, tokens: bool) -> None:
    shape = shape_of(head=kind, users=4)
    parameters = {
        name: 3 * value if value.is_floating_point() else value for name, value in shape.initial(generator(0)).items()
    }
    weighting = "mean" if tokens else None
    batch: Any = all_tokens(make_token_data()) if tokens else all_pairs(make_data(users=4))
    losses = [
        float(Objective(shape, FitConfig(bound_weight=weight, bound=0.5, token_weighting=weighting))(parameters, batch))  # type: ignore[arg-type]
        for weight in (0.0, 2.0)
    ]
    assert isinstance(shape, IdealPointHead)
    ideal = shape.points(parameters, batch.pairs if tokens else batch)[2]
    assert losses[1] - losses[0] == pytest.approx(2 * float((ideal.norm(dim=-1) - 0.5).clamp(min=0).sum()), rel=1e-4)


def test_bfloat16_forward_keeps_parameters_and_loss_in_float32() -> None:
    data = make_data(200)
    shape = shape_of(projector="mlp1-relu-dropout1-batchnorm")
    results = {
        precision: fit(shape, data, data, FitConfig(precision=precision, epochs=20, batch_size=64, warmup=0.0))
        for precision in ("float32", "bfloat16")
    }
    for result in results.values():
        assert all(
            value.dtype == torch.float32 for name, value in result.parameters.items() if not name.endswith("count")
        )
    losses = [min(row.val_loss for row in result.history) for result in results.values()]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0] != losses[1]


HEADS: list[dict[str, Any]] = [
    {}, {"score": "dist"}, {"score": "dist_logistic"}, {"mixture": "gumbel"}, {"mixture": "gumbel_hard"},
    {"mixture": "partition"},
    {"projector": "mlp1-relu-dropout1-batchnorm"}, {"head": "bradley-terry"}, {"head": "low-rank"},
    {"head": "low-rank", "user_weights": "free"}, {"head": "pca", "k": 7}, {"head": "per-user"},
]  # fmt: skip


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_every_head_learns(options: dict[str, Any]) -> None:
    shape, data = shape_of(**options), make_data(400)
    start = validate(shape, shape.initial(generator(0)), data)[0]
    result = fit(shape, data, data, FitConfig(epochs=30, batch_size=50, patience=0, lr=1e-2, lr_prototypes=2e-2))
    assert result.history[-1].val_loss < start
    accuracy = max(row.val_accuracy for row in result.history)
    blind = options.get("head") == "bradley-terry"
    assert (accuracy > 0.45) if blind else (accuracy > 0.7)


@pytest.mark.parametrize("form", ["f(Pw)", "f(P)w", "Pw", "|f(P)|w"])
def test_pal_a_learns(form: str) -> None:
    shape, data = shape_of(head="pal-a", user_form=form, p=16), make_data(400, joint=True)
    result = fit(shape, data, data, FitConfig(epochs=30, batch_size=50, patience=0, lr=1e-2, lr_prototypes=2e-2))
    assert max(row.val_accuracy for row in result.history) > 0.7


@pytest.mark.parametrize("kind", ["pal-a", "pal-b"])
@pytest.mark.parametrize("weighting", ["mean", "cumulative", "only_last"])
def test_token_losses_train(kind: str, weighting: Any) -> None:
    data = make_token_data(60, joint=kind == "pal-a")
    shape = shape_of(head=kind, users=4)
    result = fit(shape, data, data, FitConfig(token_weighting=weighting, epochs=20, batch_size=20, patience=0))
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_going_on_from_a_state_with_running_statistics() -> None:
    shape, data = shape_of(projector="mlp1-relu-dropout1-batchnorm"), make_data(90)
    config = FitConfig(epochs=6, batch_size=30, evaluations=3, patience=0, weighting="users")
    states: list[FitState] = []
    whole = fit(shape, data, data, config, on_state=states.append)
    gone_on = fit(shape, data, data, config, state=states[0])
    assert gone_on.history == whole.history
    assert any(is_buffer(name) for name in whole.parameters)
    assert all(torch.equal(value, gone_on.parameters[name]) for name, value in whole.parameters.items())


def test_a_solved_head_is_the_optimum() -> None:
    """One regression per user: the gradient of the chosen ridge problem vanishes for one of the strengths."""
    data = make_data(300, users=3)
    shape = shape_of(head="per-user", users=3)
    weights = shape.solve(data, data)["user.weights"]
    batch = all_pairs(data)
    difference = batch.responses[batch.response_2] - batch.responses[batch.response_1]
    w = weights.clone().requires_grad_()
    margin = (difference * w[batch.user]).sum(-1)
    torch.nn.functional.softplus(-margin * batch.y).sum().backward()  # type: ignore[no-untyped-call]
    size = float(difference.square().sum(-1).mean())
    assert w.grad is not None
    gaps = [float((w.grad + strength * size * weights).abs().max()) for strength in (0.01, 0.1, 1.0, 10.0)]
    assert min(gaps) < 0.02


def test_principal_directions_are_those_of_the_differences() -> None:
    data = make_data(300)
    shape = shape_of(head="pca", k=3)
    basis = shape.solve(data, data)["basis"]
    batch = all_pairs(data)
    difference = (batch.responses[batch.response_2] - batch.responses[batch.response_1]).double()
    values = torch.linalg.eigvalsh(difference.T @ difference / 300)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-5, rtol=0)
    along = ((difference @ basis.double().T) ** 2).mean(0)
    torch.testing.assert_close(along, values.flip(0)[:3], rtol=1e-4, atol=1e-6)


def test_a_user_with_one_comparison_and_one_without() -> None:
    data = make_data(9, users=3).with_users([f"user.{i}" for i in (0, 1, 2)] + ["nobody"])
    one = data.take((data.user != 1).nonzero().squeeze(-1).numpy()[:4])
    for options in HEADS:
        shape = shape_of(users=4, **options)
        result = fit(shape, one, one, FitConfig(epochs=2, batch_size=3, weighting="users"))
        assert all(torch.isfinite(value.float()).all() for value in result.parameters.values()), options


def test_joint_vectors_are_asked_for() -> None:
    data = make_data()
    with pytest.raises(InputError, match=r"these are of each alone; make them with palcache embed .* --items joint"):
        fit(shape_of(head="pal-a"), data, data, FitConfig())


def test_token_losses_need_tokens() -> None:
    data, tokens = make_data(), make_token_data(users=5)
    with pytest.raises(InputError, match=r"the cache is pooled; make them with palcache embed .* --tokens responses"):
        fit(shape_of(), data, data, FitConfig(token_weighting="mean"))
    with pytest.raises(InputError, match=r"choose --token-weighting mean, cumulative or only_last"):
        fit(shape_of(), tokens, tokens, FitConfig())
    with pytest.raises(InputError, match=r"Only pal-a and pal-b have token losses"):
        fit(shape_of(head="low-rank"), tokens, tokens, FitConfig(token_weighting="mean"))
    with pytest.raises(InputError, match=r"Only pal-a and pal-b have the bound of ideal points"):
        fit(shape_of(head="pca"), data, data, FitConfig(bound_weight=1.0))


def test_a_loss_that_is_not_finite_says_where_it_began() -> None:
    data = make_data(30)
    table = torch.cat([data.responses.take(torch.arange(11)), torch.full((1, 7), float("nan"))])
    broken = replace(
        data, responses=TensorTable(table), response_1=data.response_1.clone().index_fill_(0, torch.tensor([17]), 11)
    )
    message = r"The loss is nan at step \d+ \(epoch 1, batch \d\) with learning rate \d.\d+e-\d+; lower --lr\."
    with pytest.raises(NumericsError, match=message):
        fit(shape_of(), broken, data, FitConfig(epochs=1, batch_size=10))
    with pytest.raises(NumericsError, match="The training vectors are not finite; run palcache cache verify"):
        fit(shape_of(head="per-user"), broken, data, FitConfig())


def test_the_token_loss_is_much_faster_than_a_loop() -> None:
    best = max(time_losses(256, 64, "cumulative", rounds=3).ratio for _ in range(3))
    assert best >= 30, "the benchmark has the figure; this is what any machine reaches"


def test_a_step_on_packed_spans_is_that_of_the_loop() -> None:
    """`time_steps` compares all gradients with those of the loop before it takes times."""
    for aligned in (False, True):
        assert time_steps(24, 128, 6, aligned=aligned, rounds=1).ratio > 2
