"""Rates by group and schedule, and steps that are torch's own, of one head or of stacked ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from palcache.configs import FitConfig, HeadConfig
from palcache.heads import build_head
from palcache.heads.protocols import group_of
from palcache.optimizers import StackedOptimizer, rate_factor
from tests.building import generator


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_rise_and_fall(schedule: Any) -> None:
    config = FitConfig(schedule=schedule, warmup=0.2)
    factors = [rate_factor(config, step, 50) for step in range(50)]
    assert factors[0] == pytest.approx(0.1, rel=0.01)
    assert all(a < b for a, b in zip(factors[:9], factors[1:10], strict=True)), "the warmup is used"
    later = {"cosine": 0.5 * (1 + math.cos(math.pi * 0.6)), "linear": 0.4, "constant": 1.0}[schedule]
    assert factors[30] == pytest.approx(later)
    assert rate_factor(FitConfig(schedule=schedule, warmup=0.0), 0, 50) == 1


def step_of(config: FitConfig, parameters: dict[str, torch.Tensor], gradient: float) -> dict[str, torch.Tensor]:
    """Return how far a first step moves the parameters of one head, down the gradient."""
    before = {name: value.clone() for name, value in parameters.items()}
    stacked = {name: value.unsqueeze(0) for name, value in parameters.items()}
    optimizer = StackedOptimizer(stacked, [replace(config, warmup=0.0)], 10)
    optimizer.step({name: torch.full_like(value, gradient) for name, value in stacked.items()})
    return {name: before[name] - value for name, value in parameters.items()}


def test_learning_rates_by_group() -> None:
    """A first step of Adam moves every number by its learning rate, and only projectors decay."""
    shape = build_head(HeadConfig(head="pal-a", score="angle", k=2, p=4), d=7, users=5)
    config = FitConfig(lr=1e-4, lr_users=2e-3, lr_prototypes=3e-3, lr_scale=0.1, weight_decay=0.0, optimizer="adam")
    rates = {"projectors": 1e-4, "users": 2e-3, "prototypes": 3e-3, "scale": 0.1}
    parameters = shape.initial(generator(0))
    assert {group_of(name) for name in parameters} == rates.keys()
    for name, moved in step_of(config, shape.initial(generator(0)), 1.0).items():
        torch.testing.assert_close(moved, torch.full_like(moved, rates[group_of(name)]), rtol=1e-3, atol=1e-7)
    decayed = step_of(replace(config, optimizer="adamw", weight_decay=0.5), shape.initial(generator(0)), 0.0)
    for name, moved in decayed.items():
        expected = 0.5 * 1e-4 * parameters[name] if group_of(name) == "projectors" else torch.zeros_like(moved)
        torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-7)


def test_coupled_decay_is_not_decoupled() -> None:
    """Adam adds the decay to the gradient: beside a zero gradient it moves by the learning rate, AdamW by lr times decay."""
    moved = {}
    for kind in ("adam", "adamw"):
        config = FitConfig(optimizer=kind, lr=0.1, weight_decay=0.01)
        moved[kind] = float(step_of(config, {"f.0.weight": torch.full((3,), 2.0)}, 0.0)["f.0.weight"][0])
    assert moved == {"adam": pytest.approx(0.1, rel=1e-3), "adamw": pytest.approx(0.002, rel=1e-3)}


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_stacked_steps_are_those_of_torch(optimizer: Any) -> None:
    """Heads with rates of their own, one of them leaving half way, against torch's optimizer on each alone."""
    configs = [
        FitConfig(optimizer=optimizer, lr=0.1 / (i + 1), weight_decay=0.2 * (i // 2), lr_users=0.3) for i in range(4)
    ]
    shapes = {"f.0.weight": (3, 2), "user.logits": (5, 2), "logit_scale": ()}
    g = generator(3)
    start = {name: torch.randn(4, *shape, generator=g) for name, shape in shapes.items()}
    gradients = [{name: torch.randn(4, *shape, generator=g) for name, shape in shapes.items()} for _ in range(6)]
    alone = []
    for head, config in enumerate(configs):
        own = {name: value[head].clone().requires_grad_() for name, value in start.items()}
        rates = {
            "f.0.weight": (config.lr, config.weight_decay),
            "user.logits": (0.3, 0.0),
            "logit_scale": (config.lr_scale, 0.0),
        }
        groups = [{"params": [own[name]], "lr": lr, "weight_decay": decay} for name, (lr, decay) in rates.items()]
        single = (torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam)(groups, fused=True)
        peaks = [group["lr"] for group in single.param_groups]
        for step, gradient in enumerate(gradients):
            for group, peak in zip(single.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_factor(config, step, 10)
            for name, value in own.items():
                value.grad = gradient[name][head].clone()
            single.step()
        alone.append(own)
    values = {name: value.clone() for name, value in start.items()}
    stacked, kept = StackedOptimizer(values, configs, 10), torch.arange(4)
    for step, gradient in enumerate(gradients):
        if step == 3:
            kept = torch.tensor([0, 2, 3])
            values = {name: value[kept] for name, value in values.items()}
            stacked.take(kept, values)
        turned = {name: value[kept].transpose(0, -1).contiguous().transpose(0, -1) for name, value in gradient.items()}
        stacked.step(turned)
    for at, head in enumerate(kept.tolist()):
        for name, value in alone[head].items():
            torch.testing.assert_close(values[name][at], value.detach(), atol=1e-6, rtol=1e-6)


def test_a_parameter_of_other_strides_is_trained_too() -> None:
    """A caller's own state may hold a transposed tensor."""
    values = torch.ones(1, 64, 8).transpose(1, 2)
    optimizer = StackedOptimizer({"f.0.weight": values}, [FitConfig(warmup=0.0)], 10)
    optimizer.step({"f.0.weight": torch.ones(1, 8, 64)})
    assert bool((values < 1).all())
