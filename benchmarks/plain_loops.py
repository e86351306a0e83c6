"""What one would write without palcache: PAL-B as `nn.Module`s, trained by a loop over a `DataLoader`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.measuring import clock, finish
from palcache import PalB, PreferenceData
from palcache.noises import Noise
from palcache.tensors import PairBatch

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]
Margins = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Margins of a batch: prompt, left and right vectors, each (n, d), and users, (n,) -> (n,)."""


@final
class CachedVectors(Dataset[Sample]):
    """Comparisons one by one, their vectors in main memory.

    Args:
        data: comparisons.
    """

    def __init__(self, data: PreferenceData) -> None:
        self.prompts, self.responses = (
            table.take(torch.arange(len(table), device=data.device)).cpu() for table in (data.prompts, data.responses)
        )
        self.rows = torch.stack([data.prompt, data.response_1, data.response_2, data.user], dim=1).tolist()
        self.y = data.y.cpu()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        prompt, left, right, user = self.rows[index]
        return self.prompts[prompt], self.responses[left], self.responses[right], user, self.y[index]


@final
class PlainPalB(nn.Module):
    """PAL-B with two hidden layers in each projector, in the usual modules.

    Args:
        shape: what it is to compute; the projector must be `mlp2-relu-dropout1`.
        parameters: as `shape.initial` draws them.
    """

    def __init__(self, shape: PalB, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        assert shape.projector == "mlp2-relu-dropout1"
        self.items = _projector(shape, parameters, "f.", ())
        self.prototypes = nn.ModuleList(_projector(shape, parameters, "g.", (j,)) for j in range(shape.k))
        self.users = nn.Parameter(parameters["user.logits"].clone())
        self.logit_scale = nn.Parameter(parameters["logit_scale"].clone())

    def forward(
        self, prompts: torch.Tensor, left: torch.Tensor, right: torch.Tensor, user: torch.Tensor
    ) -> torch.Tensor:
        """Return the margins of a batch, (n,)."""
        mixtures = torch.softmax(self.users[user], dim=-1)
        goals = torch.stack([g(prompts) for g in self.prototypes], dim=1)
        ideal = F.normalize((mixtures.unsqueeze(-1) * goals).sum(1), dim=-1)
        first, second = F.normalize(self.items(torch.cat([left, right])), dim=-1).chunk(2)
        return self.logit_scale.exp().clamp(max=100) * ((second - first) * ideal).sum(-1)


def _projector(
    shape: PalB, parameters: Mapping[str, torch.Tensor], prefix: str, copy: tuple[int, ...]
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, fan_in in enumerate((shape.d, shape.p, shape.p)):
        linear = nn.Linear(fan_in, shape.p)
        with torch.no_grad():
            linear.weight.copy_(parameters[f"{prefix}{number}.weight"][copy])
            linear.bias.copy_(parameters[f"{prefix}{number}.bias"][copy])
        layers += [*([nn.Dropout(0.1), nn.ReLU()] if number else []), linear]
    return nn.Sequential(*layers)


def palcache_margins(shape: PalB, parameters: Mapping[str, torch.Tensor], device: str) -> Margins:
    """Return palcache's own margins as a plain loop calls them: every row of the batch is projected."""
    steps = itertools.count()

    def margins(prompts: torch.Tensor, left: torch.Tensor, right: torch.Tensor, user: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(user), device=user.device)
        unsigned = torch.zeros(len(user), device=user.device)  # margins know no answers
        batch = PairBatch(prompts, rows, torch.cat([left, right]), rows, rows + len(user), user, unsigned)
        return shape.margins(parameters, batch, noise=Noise.of(0, next(steps), device=device))

    return margins


def train_epoch(margins: Margins, parameters: Iterable[torch.Tensor], loader: DataLoader[Any], device: str) -> float:
    """Train one epoch with AdamW; return its seconds."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    def epoch() -> None:
        for prompts, left, right, user, y in loader:
            at = [value.to(device) for value in (prompts, left, right, user)]
            loss = F.binary_cross_entropy_with_logits(margins(*at), (y.to(device) + 1) / 2)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        finish(device)

    return clock(epoch)
