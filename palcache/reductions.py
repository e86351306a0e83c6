"""Reductions: on a frozen head a comparison is k numbers and its prompt a k x k matrix, whatever d and p are.

For a user's mixture w, unit items f and prototypes G (k, p) of the prompt, the margin of cosine scores is
`scale (f_2 - f_1) . G'w / |G'w| = b . w / sqrt(w' M w)` with `b = scale G (f_2 - f_1)` and the Gram matrix `M = G G'`.
Everything that new users need (their likelihood, its gradient, its Fisher information) is a function of b and M.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, TypeGuard, final

import torch
import torch.nn.functional as F

from palcache.checkpoints import TrainedHead
from palcache.errors import InputError
from palcache.heads import Head, PalB, head_to_dict, scale
from palcache.tensors import PreferenceData

REDUCE_ROWS: Final = 16_384
"""Rows that are projected at once."""
MIN_NORM: Final = 1e-12
"""Below this the norm of an ideal point counts as this, as in `torch.nn.functional.normalize`."""


_COSINES: Final = frozenset({"angle", "angle_hinge"})
_SOFT: Final = frozenset({"softmax", "gumbel"})
"""Mixtures that are the softmax of the user weights in evaluation."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ReducedComparisons:
    """n comparisons as a frozen head sees them; float64, on one device.

    Attributes:
        b: scaled products of the prototypes with the difference of the unit items, (n, k).
        grams: Gram matrix of the prototypes of each distinct prompt, (P, k, k).
        prompt: row of each comparison's prompt in `grams`, (n,) int64.
        y: -1, 0 or +1, (n,).
        user: number of the user in `users`, (n,) int64.
        users: ids of the users.
        temperature: of the head's softmax over user weights.
    """

    b: torch.Tensor
    grams: torch.Tensor
    prompt: torch.Tensor
    y: torch.Tensor
    user: torch.Tensor
    users: tuple[str, ...]
    temperature: float

    def __len__(self) -> int:
        return len(self.y)

    @property
    def k(self) -> int:
        """Number of prototypes."""
        return self.b.shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """Number of comparisons of each user, (u,) int64."""
        return torch.bincount(self.user, minlength=len(self.users))

    def take(self, rows: torch.Tensor) -> ReducedComparisons:
        """Return some of the comparisons, of the same users."""
        names = ("b", "prompt", "y", "user")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def margins(self, mixtures: torch.Tensor) -> torch.Tensor:
        """Return r(response_2) - r(response_1) under a mixture per user, (u, k) -> (n,)."""
        weights = mixtures.to(self.b)[self.user]
        return margins_of(self.b, self.grams[self.prompt], weights)


def margins_of(b: torch.Tensor, grams: torch.Tensor, mixtures: torch.Tensor) -> torch.Tensor:
    """Return `b . w / sqrt(w' M w)`: (..., k), (..., k, k), (..., k) -> (...)."""
    square = (mixtures * (grams @ mixtures.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return (b * mixtures).sum(-1) / square.clamp_min(MIN_NORM**2).sqrt()


def float64_device(device: torch.device) -> torch.device:
    """Return the device itself, or the CPU for one that has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def is_reducible(shape: Head) -> TypeGuard[PalB]:
    """Return whether comparisons reduce to size k: on PAL-B with cosine scores, whose users have softmax mixtures."""
    return isinstance(shape, PalB) and shape.score in _COSINES and shape.mixture in _SOFT


def require_reducible(shape: Head) -> PalB:
    """Return the shape of a head that new users can be adapted on; raise InputError for any other."""
    if is_reducible(shape):
        return shape
    values = head_to_dict(shape)
    described = ", ".join(str(values[name]) for name in ("head", "score", "mixture") if name in values)
    raise InputError(
        f"New users are adapted on PAL-B with cosine scores and softmax mixtures, and this head is another ({described}); "
        "train one with palcache train-head --head pal-b --score angle."
    )


@torch.no_grad()
def reduce_comparisons(head: TrainedHead, data: PreferenceData) -> ReducedComparisons:
    """Return the comparisons in terms of size k on the data's `float64_device`; each distinct text is projected once.

    Args:
        head: on the device of the data.
        data: comparisons; their users keep their numbers and must all be numbered (no -1).

    Raises:
        InputError: the head is not one of `is_reducible`.
    """
    shape = require_reducible(head.shape)
    used_prompts, prompt = torch.unique(data.prompt, return_inverse=True)
    used, pair = torch.unique(torch.stack([data.response_1, data.response_2]), return_inverse=True)
    chunks = torch.split(used, REDUCE_ROWS)
    parts = [F.normalize(shape.project_responses(head.parameters, data.responses.take(at)), dim=-1) for at in chunks]
    items = torch.cat([*parts, torch.empty(0, shape.p, device=data.device)])
    n, k, where = len(data), shape.k, float64_device(data.device)
    b = torch.empty(n, k, device=data.device)
    grams = torch.empty(len(used_prompts), k, k, dtype=torch.float64, device=where)
    order = torch.argsort(prompt, stable=True)
    first = 0
    for at in torch.split(used_prompts, REDUCE_ROWS // max(1, k // 2)):
        prototypes = shape.project_prompts(head.parameters, data.prompts.take(at))  # (k, m, p)
        wide = prototypes.transpose(0, 1).to(where).double()
        grams[first : first + len(at)] = wide @ wide.transpose(1, 2)
        edges = torch.tensor([first, first + len(at)], device=data.device)
        start, end = torch.searchsorted(prompt[order], edges).tolist()
        for rows in torch.split(order[start:end], REDUCE_ROWS):
            difference = items[pair[1, rows]] - items[pair[0, rows]]
            for j in range(k):
                b[rows, j] = (F.embedding(prompt[rows] - first, prototypes[j]) * difference).sum(-1)
        first += len(at)
    b *= scale(head.parameters)
    columns = (b.to(where).double(), grams, prompt.to(where), data.y.to(where).double(), data.user.to(where))
    return ReducedComparisons(*columns, data.users, shape.temperature)
