"""A stack trains each head as `fit` trains it alone: losses, best steps, early stops, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from palcache import fits, stacked_batches, stacks, vector_tables
from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig
from palcache.errors import InputError, NumericsError
from palcache.fits import FitResult
from palcache.heads import build_head
from palcache.stacks import Member, StackProgress, fit_stack
from palcache.tensors import PreferenceData, Table, TensorTable
from palcache.training import fit
from tests.building import make_data
from tests.worlds import make_cache, planted_rows, splits_of

USERS, WIDTH = 5, 7
QUICK = FitConfig(batch_size=16, epochs=4, evaluations=6, lr=0.01, patience=2)
VARIED = (
    QUICK,
    replace(QUICK, seed=1, lr=0.003, weight_decay=0.3),
    replace(QUICK, seed=2, lr_users=0.01, warmup=0.5, patience=1),
    replace(QUICK, seed=3, schedule="linear", patience=0),
)


def members(heads: list[HeadConfig], configs: tuple[FitConfig, ...] = VARIED) -> list[Member]:
    return [Member(build_head(head, d=WIDTH, users=USERS), config) for head, config in zip(heads, configs, strict=True)]


def splits(**options: Any) -> tuple[PreferenceData, PreferenceData]:
    """Return training and validation; validation has users whom the heads do not know."""
    train, val = (make_data(n, USERS, WIDTH, seed=1, **options) for n in (120, 66))
    return train, replace(val, user=torch.where(torch.arange(66) % 7 == 0, -1, val.user))


def assert_as_alone(
    stack: list[Member], train: PreferenceData, val: PreferenceData, tolerance: float = 2e-5
) -> list[FitResult]:
    """Train a stack, and each head alone; return the results of the stack."""
    found = fit_stack(stack, train, val)
    results = []
    for member, result in zip(stack, found, strict=True):
        alone = fit(member.shape, train, val, member.config)
        assert isinstance(result, FitResult)
        assert (result.best_step, result.stopped_early) == (alone.best_step, alone.stopped_early)
        for name in ("step", "epoch", "lr"):
            assert [getattr(row, name) for row in result.history] == [getattr(row, name) for row in alone.history]
        for name in ("train_loss", "val_loss", "scale"):
            expected = np.array([getattr(row, name) for row in alone.history])
            np.testing.assert_allclose(
                [getattr(row, name) for row in result.history], expected, atol=tolerance, rtol=1e-5
            )
        assert {name: value.shape for name, value in result.parameters.items()} == {
            name: value.shape for name, value in alone.parameters.items()
        }
        results.append(result)
    return results


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig(p=4),
        HeadConfig(p=4, k=1),
        HeadConfig(p=WIDTH, projector="mlp2-linear-dropout05-residual"),
        HeadConfig(p=4, score="dist", mixture="gumbel"),
        HeadConfig(p=4, score="dist_normalized"),
        HeadConfig(p=4, score="dist_logistic", mixture="partition"),
        HeadConfig(p=4, score="angle_hinge", mixture="gumbel_hard"),
        HeadConfig(p=4, head="bradley-terry"),
        HeadConfig(head="bradley-terry", projector="identity"),
        HeadConfig(head="low-rank", k=3),
        HeadConfig(head="low-rank", user_weights="free"),
    ],
    ids=lambda head: f"{head.head}-{head.k}-{head.score}-{head.mixture}-{head.projector}",
)
def test_every_kind_of_head_is_trained_as_alone(head: HeadConfig) -> None:
    results = assert_as_alone(members([head] * 4), *splits())
    assert len({result.history for result in results}) == 4


def test_running_statistics_are_each_heads_own() -> None:
    """A batchnorm divides by small deviations, and so enlarges the rounding of products in another order."""
    head = HeadConfig(p=4, projector="mlp1-gelu-dropout2-batchnorm-nobias")
    results = assert_as_alone(members([head] * 4), *splits(), tolerance=5e-3)
    means = [result.parameters["f.0.norm.mean"] for result in results]
    assert all(not torch.equal(means[0], mean) for mean in means[1:])
    assert all(int(result.parameters["f.0.norm.count"]) == 2 * result.best_step for result in results)


@pytest.mark.parametrize("form", ["f(P)w", "Pw", "|f(P)|w"])
def test_joint_heads_are_trained_as_alone(form: Any) -> None:
    head = HeadConfig(p=4, head="pal-a", k=3, user_form=form, score="angle")
    assert_as_alone(members([head] * 4), *splits(joint=True))


def test_numbers_of_shape_and_loss_may_differ_within_a_stack() -> None:
    """Temperature, dropout, start, bound and its weight."""
    heads = [
        HeadConfig(p=4, temperature=1 + i, projector=f"mlp1-relu-dropout{i}", start="published" if i % 2 else "shared")
        for i in range(4)
    ]
    configs = tuple(
        replace(config, bound_weight=0.1 * (i + 1), bound=0.2 * i, weighting="users") for i, config in enumerate(VARIED)
    )
    stack = members(heads, configs)
    assert len({member.kind(120) for member in stack}) == 1
    assert_as_alone(stack, *splits())


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ({"k": 3}, {}), ({"p": 5}, {}), ({"score": "dist"}, {}), ({"projector": "mlp1-gelu-dropout1"}, {}),
        ({}, {"batch_size": 8}),
        ({}, {"epochs": 3}), ({}, {"loss": "hinge"}), ({}, {"optimizer": "adam"}), ({}, {"bound_weight": 0.1}),
        ({}, {"evaluations": 3}), ({}, {"precision": "bfloat16"}), ({}, {"weighting": "users"}),
    ],
)  # fmt: skip
def test_what_changes_shapes_or_steps_makes_another_stack(head: dict[str, Any], config: dict[str, Any]) -> None:
    base = HeadConfig(p=4, projector="mlp1-relu-dropout1")
    one, other = members([base, replace(base, **head)], (QUICK, replace(QUICK, **config)))
    assert one.kind(120) != other.kind(120)


def test_validation_in_other_pieces_gives_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, data = members([HeadConfig(p=4)] * 4), splits()
    expected = [result.history for result in fit_stack(stack, *data) if isinstance(result, FitResult)]
    monkeypatch.setattr(stacks, "EVALUATION_VALUES", 1)
    assert [result.history for result in fit_stack(stack, *data) if isinstance(result, FitResult)] == expected


def test_adam_with_coupled_decay_is_stacked_too() -> None:
    assert_as_alone(members([HeadConfig(p=4)] * 4, tuple(replace(c, optimizer="adam") for c in VARIED)), *splits())


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [(6, 11), (20, 40), (300, 400)],
    ids=["tables shared whole", "each row once", "rows as they come"],
)
def test_the_way_to_the_vectors_changes_nothing(prompts: int, responses: int) -> None:
    assert_as_alone(members([HeadConfig(p=4)] * 4), *splits(prompts=prompts, responses=responses))


def test_repeated_rows_are_read_once_or_as_they_come_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    data, stack = splits(prompts=20, responses=40), members([HeadConfig(p=4)] * 4)
    once = assert_as_alone(stack, *data)
    monkeypatch.setattr(vector_tables, "REPEATS", 0.0)
    for result, other in zip(once, assert_as_alone(stack, *data), strict=True):
        assert result.best_step == other.best_step


def test_streamed_vectors_are_trained_on_as_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("palcache.tensors.MEMORY_SHARE", 0)
    cache: Cache = make_cache(tmp_path / "cache", *planted_rows())
    data = splits_of(cache)
    assert data["train"].streamed
    shape = build_head(HeadConfig(p=4), d=10, users=7)
    assert_as_alone([Member(shape, config) for config in VARIED], data["train"], data["val"])


def test_a_broken_head_is_reported_and_the_others_go_on() -> None:
    configs = (VARIED[0], replace(VARIED[1], lr=1e30), VARIED[2])
    stack, (train, val) = members([HeadConfig(p=4)] * 3, configs), splits()
    first, broken, last = fit_stack(stack, train, val)
    with pytest.raises(NumericsError, match="lower --lr") as alone:
        fit(stack[1].shape, train, val, stack[1].config)
    assert isinstance(broken, NumericsError)
    assert str(broken) == str(alone.value)
    for member, result in ((stack[0], first), (stack[2], last)):
        assert isinstance(result, FitResult)
        expected = fit(member.shape, train, val, member.config)
        assert result.history[-1].val_loss == pytest.approx(expected.history[-1].val_loss, abs=2e-5)


def test_heads_leave_the_stack_as_they_stop() -> None:
    events: list[StackProgress] = []
    stack, (train, val) = members([HeadConfig(p=4)] * 4), splits()
    results = fit_stack(stack, train, val, on_progress=events.append)
    assert sorted(number for event in events for number in event.ended) == [0, 1, 2, 3]
    left = 4
    for event in events:
        left -= len(event.ended)
        assert event.heads == left
    for number, result in enumerate(results):
        assert isinstance(result, FitResult)
        (end,) = (event.step for event in events if number in event.ended)
        assert result.history[-1].step == end
    assert any(result.stopped_early for result in results if isinstance(result, FitResult))


def test_users_that_do_not_fit_are_refused() -> None:
    train, val = splits()
    with pytest.raises(InputError, match="numbered for 4 users, the head for 5"):
        fit_stack(members([HeadConfig(p=4)] * 4), train, replace(val, users=val.users[:4]))


def test_a_stack_uses_as_many_threads_as_it_keeps_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    forward = stacked_batches.StackedOrder.batch

    def watched(self: stacked_batches.StackedOrder, step: int) -> stacked_batches.StackedBatch:
        seen.append(torch.get_num_threads())
        return forward(self, step)

    monkeypatch.setattr(stacked_batches.StackedOrder, "batch", watched)
    stack, data = members([HeadConfig(p=4)] * 4), splits()
    try:
        torch.set_num_threads(2)
        fit_stack(stack, *data)
        monkeypatch.setattr(fits, "WORK_PER_THREAD", 1)
        fit_stack(stack, *data)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1, 2}


def on_gpu(table: Table) -> TensorTable:
    assert table.resident is not None
    return TensorTable(table.resident.cuda())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stack_on_a_gpu_is_trained_as_alone() -> None:
    train, val = (
        replace(
            data,
            prompts=on_gpu(data.prompts),
            responses=on_gpu(data.responses),
            **{name: getattr(data, name).cuda() for name in ("prompt", "response_1", "response_2", "user", "y")},
        )
        for data in splits()
    )
    assert_as_alone(members([HeadConfig(p=4)] * 4), train, val, tolerance=1e-4)
