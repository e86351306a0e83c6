"""Optimizers and schedules: learning rates and weight decay by group of parameters, of one head or of stacked ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from palcache.configs import FitConfig
from palcache.heads.protocols import Group, group_of

ORDER: Final[tuple[Group, ...]] = ("projectors", "users", "scale", "prototypes")


def build_optimizer(
    parameters: Mapping[str, torch.Tensor], config: FitConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW or Adam with the learning rates and weight decay of each group of parameters.

    AdamW's weight decay is decoupled from the gradient (Loshchilov and Hutter, ICLR 2019); Adam adds it to the gradient,
    as the published implementation does. Only projectors decay.

    Args:
        parameters: those to be trained, by name.
        config: which optimizer, and its rates.
        device: where the parameters are.
    """
    groups: list[dict[str, Any]] = []
    for group in ORDER:
        members = [value for name, value in parameters.items() if group_of(name) == group]
        if members or group == "projectors":
            lr, decay = _rates(config, group)
            groups.append({"params": members, "lr": lr, "weight_decay": decay})
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, fused=_fused(device))


def _rates(config: FitConfig, group: Group) -> tuple[float, float]:
    """Return the peak learning rate and the weight decay of a group."""
    rates: dict[Group, tuple[float, float]] = {
        "projectors": (config.lr, config.weight_decay),
        "users": (config.lr_users, 0.0),
        "scale": (config.lr_scale, 0.0),
        "prototypes": (config.lr_prototypes, 0.0),
    }
    return rates[group]


def _fused(device: torch.device) -> bool:
    return device.type in {"cpu", "cuda"}


def rate_factor(config: FitConfig, step: int, steps: int) -> float:
    """Return the factor on the peak learning rates at a step (from 0): linear warmup times the schedule.

    `cosine` is half a cosine down to 0 over all steps, `linear` a straight line down to 0, `constant` is 1.
    """
    rising = min(1.0, (step + 1) / max(1.0, config.warmup * steps))
    if config.schedule == "constant":
        return rising
    if config.schedule == "linear":
        return rising * (1 - step / steps)
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


@final
class StackedOptimizer:
    """torch's AdamW or Adam on parameters of heads that are stacked on a leading axis, each head with its own rates.

    Neighbours of equal rates are stepped in one call, so heads are best sorted by them.

    Args:
        parameters: those to be trained, (h, ...) each, by name; they are changed in place.
        configs: of each head; the optimizer is the same for all.
        steps: of the training, for the schedules.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], configs: Sequence[FitConfig], steps: int) -> None:
        self._parameters = {name: value.detach() for name, value in parameters.items()}
        self._moments = [{name: torch.zeros_like(v) for name, v in self._parameters.items()} for _ in range(2)]
        self._configs, self._steps, self._step = list(configs), steps, 0
        self._runs = self._find_runs()

    def step(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        """Take a step; parameters without a gradient stay as they are."""
        kind: Any = adamw if self._configs[0].optimizer == "adamw" else adam
        for run in self._runs:
            names = [name for name in run.names if gradients[name] is not None]
            if names:
                found = [gradients[name][run.heads].contiguous() for name in names]  # type: ignore[index] # none is None
                lists = [[run.views[name][i] for name in names] for i in range(3)]
                counts = [run.counts[name] for name in names]
                factor = rate_factor(run.config, self._step, self._steps)
                kind(lists[0], found, lists[1], lists[2], [], counts, fused=_fused(found[0].device), amsgrad=False,
                     beta1=0.9, beta2=0.999, lr=run.lr * factor, weight_decay=run.decay, eps=1e-8, maximize=False)  # fmt: skip
        self._step += 1

    def take(self, heads: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> None:
        """Go on with some of the heads, whose parameters these are."""
        self._parameters = {name: value.detach() for name, value in parameters.items()}
        self._moments = [{name: value[heads] for name, value in moment.items()} for moment in self._moments]
        self._configs = [self._configs[i] for i in heads.tolist()]
        self._runs = self._find_runs()

    def _find_runs(self) -> list[_Run]:
        """Return the neighbours of equal rates, group by group."""
        runs = []
        for group in ORDER:
            names = [name for name in self._parameters if group_of(name) == group]
            keys = [(*_rates(config, group), config.warmup, config.schedule) for config in self._configs]
            starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
            for first, last in zip(starts, [*starts[1:], len(keys)], strict=True):
                heads, (lr, decay, *_) = slice(first, last), keys[first]
                views = {
                    name: (self._parameters[name][heads], *(moment[name][heads] for moment in self._moments))
                    for name in names
                }
                counts = {
                    name: torch.full((), float(self._step), device=self._parameters[name].device) for name in names
                }
                runs.append(_Run(heads, tuple(names), views, counts, self._configs[first], lr, decay))
        return runs


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Neighbours of equal rates: parameters and both moments, and steps so far, by name."""

    heads: slice
    names: tuple[str, ...]
    views: Mapping[str, tuple[torch.Tensor, ...]]
    counts: Mapping[str, torch.Tensor]
    config: FitConfig
    lr: float
    decay: float
