"""Optimizers and schedules: learning rates and weight decay by group of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

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
    rates: dict[Group, tuple[float, float]] = {
        "projectors": (config.lr, config.weight_decay),
        "users": (config.lr_users, 0.0),
        "scale": (config.lr_scale, 0.0),
        "prototypes": (config.lr_prototypes, 0.0),
    }
    groups: list[dict[str, Any]] = []
    for group in ORDER:
        members = [value for name, value in parameters.items() if group_of(name) == group]
        if members or group == "projectors":
            lr, decay = rates[group]
            groups.append({"params": members, "lr": lr, "weight_decay": decay})
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, fused=device.type in {"cpu", "cuda"})


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
