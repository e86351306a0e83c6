"""Optimizers and schedules: learning rates and weight decay by group of parameters, of one head or of stacked ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from palcache.configs import FitConfig
from palcache.heads.protocols import Group, group_of

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
LANES: Final = 64
"""Numbers that the widest processors step at once, and more."""
ORDER: Final[tuple[Group, ...]] = ("projectors", "users", "scale", "prototypes")


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

    AdamW's weight decay is decoupled from the gradient (Loshchilov and Hutter, ICLR 2019); Adam adds it to the gradient,
    as the published implementation does. Only projectors decay.

    A head takes the same steps in every stack, to the last bit. Neighbours of equal rates are stepped in one call, so heads
    are best sorted by them.

    Args:
        parameters: those to be trained, (h, ...) each, by name; they are changed in place.
        configs: of each head; the optimizer is the same for all.
        steps: of the training, for the schedules.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], configs: Sequence[FitConfig], steps: int) -> None:
        self._rows = {name: _Rows.of(value.detach()) for name, value in parameters.items()}
        self._moments = [{n: torch.zeros_like(rows.values) for n, rows in self._rows.items()} for _ in MOMENTS]
        self._configs, self._steps, self._step = list(configs), steps, 0
        self._runs = self._find_runs()

    def step(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        """Take a step; parameters without a gradient stay as they are."""
        kind: Any = adamw if self._configs[0].optimizer == "adamw" else adam
        found = {name: self._rows[name].padded(g) for name, g in gradients.items() if g is not None}
        for run in self._runs:
            names = [name for name in run.names if name in found]
            if names:
                lists = [[run.views[name][i] for name in names] for i in range(3)]
                own = [found[name][run.heads] for name in names]
                counts = [run.counts[name] for name in names]
                factor = rate_factor(run.config, self._step, self._steps)
                kind(lists[0], own, lists[1], lists[2], [], counts, fused=_fused(own[0].device), amsgrad=False,
                     beta1=0.9, beta2=0.999, lr=run.lr * factor, weight_decay=run.decay, eps=1e-8, maximize=False)  # fmt: skip
        for name in found:
            self._rows[name].write()
        self._step += 1

    def take(self, heads: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> None:
        """Go on with some of the heads, whose parameters these are."""
        self._rows = {name: _Rows.of(value.detach()) for name, value in parameters.items()}
        self._moments = [{name: value[heads] for name, value in moment.items()} for moment in self._moments]
        self._configs = [self._configs[i] for i in heads.tolist()]
        self._runs = self._find_runs()

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """Return what a head needs to go on: `<parameter>/exp_avg` and `<parameter>/exp_avg_sq`."""
        return {
            f"{name}/{moment}": rows.unpadded(values[name])[head].clone()
            for moment, values in zip(MOMENTS, self._moments, strict=True)
            for name, rows in self._rows.items()
        }

    def restore(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Go on from the state of a stack's only head, after so many steps; what it does not name begins anew."""
        for moment, values in zip(MOMENTS, self._moments, strict=True):
            for name, rows in self._rows.items():
                if f"{name}/{moment}" in state:
                    rows.unpadded(values[name]).copy_(state[f"{name}/{moment}"])
        self._step = step
        self._runs = self._find_runs()

    def _find_runs(self) -> list[_Run]:
        """Return the neighbours of equal rates, group by group."""
        runs = []
        for group in ORDER:
            names = [name for name in self._rows if group_of(name) == group]
            keys = [(*_rates(config, group), config.warmup, config.schedule) for config in self._configs]
            starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
            for first, last in zip(starts, [*starts[1:], len(keys)], strict=True):
                heads, (lr, decay, *_) = slice(first, last), keys[first]
                views = {
                    name: (self._rows[name].values[heads], *(moment[name][heads] for moment in self._moments))
                    for name in names
                }
                counts = {name: torch.full((), float(self._step), device=views[name][0].device) for name in names}
                runs.append(_Run(heads, tuple(names), views, counts, self._configs[first], lr, decay))
        return runs


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A parameter of stacked heads with one row per head, (h, s) with s a multiple of `LANES`.

    A processor steps numbers in vectors, and what is left over at the end one by one, which rounds in another way. With
    whole vectors for every head nothing is left over, and a head's steps do not depend on who stands beside it.

    Attributes:
        parameter: (h, ...).
        values: the same memory, or a padded copy.
    """

    parameter: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, parameter: torch.Tensor) -> _Rows:
        """Return a parameter's rows."""
        flat = parameter.reshape(len(parameter), -1)
        missing = -flat.shape[1] % LANES
        return cls(parameter, F.pad(flat, (0, missing)) if missing else flat)

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the parameter's shape as rows."""
        flat = values.reshape(len(values), -1)
        missing = self.values.shape[1] - flat.shape[1]
        return F.pad(flat, (0, missing)) if missing else flat.contiguous()

    def unpadded(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a view of rows in the parameter's shape."""
        view: torch.Tensor = rows[:, : self.parameter[0].numel()].view(self.parameter.shape)
        return view

    def write(self) -> None:
        """Bring the parameter up to date with its rows."""
        if self.values.data_ptr() != self.parameter.data_ptr():
            self.parameter.copy_(self.unpadded(self.values))


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
