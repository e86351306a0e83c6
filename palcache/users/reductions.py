"""Reductions: on a frozen head a comparison is a few numbers of size k, whatever d and p are.

Where a user's ideal point is a mixture of k prototypes G (k, p), `a = G'w`, the reward of an item x depends on it through
`<x, a> = (G x) . w` and `|a|^2 = w' (G G') w` alone (`palcache.users.jets`). So a comparison is reduced to the products
`G x` of its items, k numbers each, and its prompt to the k x k Gram matrix `G G'`; everything that new users need (likelihood,
gradient, curvature, Fisher information) is a function of these. Cosines and linear rewards need the difference of the items
alone.

PAL-A's `f(Pw)` is no mixture of fixed points. There the items themselves stand for the products (p numbers instead of k),
the Gram matrix is the identity, and the ideal point is computed from w by the frozen projector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeGuard, final

import torch

from palcache.checkpoints import TrainedHead
from palcache.choices import Loss
from palcache.errors import InputError
from palcache.heads import Head, LowRank, PalA, PalB, Parameters, head_to_dict, scale, unit
from palcache.tensors import PreferenceData
from palcache.users.jets import ONE_SIDED, Kind, reward

Adaptable = PalA | PalB | LowRank
IdealPoint = Callable[[torch.Tensor], torch.Tensor]
"""From mixtures, (..., k), to ideal points in the space of the products, (..., m)."""

REDUCE_ROWS: Final = 16_384
"""Rows that are projected at once."""
REDUCE_CELLS: Final = 4_000_000
"""Numbers of items, or of prototypes, that are multiplied at once (32 MB)."""
_KINDS: Final[dict[str, Kind]] = {
    "angle": "cosine",
    "angle_hinge": "cosine",
    "dist": "distance",
    "dist_logistic": "distance",
    "dist_normalized": "unit_distance",
}
_UNSCALED: Final = frozenset({"dist", "dist_normalized"})
_SOFT: Final = frozenset({"softmax", "gumbel"})
"""Mixtures that are the softmax of the user weights in evaluation."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ReducedComparisons:
    """n comparisons as a frozen head sees them; float64, on one device.

    Attributes:
        kind: how a reward depends on the products, see `palcache.users.jets`.
        products: of the prototypes with each side, left and right, or with the difference of the sides, (n, 2 or 1, m);
            m is k where ideal points are mixtures.
        squares: squared norm of each side's item, (n, 2 or 1); zeros where the kind does not read them.
        grams: Gram matrix of the prototypes of each distinct prompt, (P, m, m).
        prompt: row of each comparison's prompt in `grams`, (n,) int64.
        y: -1, 0 or +1, (n,).
        user: number of the user in `users`, (n,) int64.
        users: ids of the users.
        k: number of prototypes.
        temperature: of the head's softmax over user weights.
        scale: factor of every margin.
        loss: that the head was trained with.
        ideal: from mixtures to ideal points, where they are not the mixtures themselves.
    """

    kind: Kind
    products: torch.Tensor
    squares: torch.Tensor
    grams: torch.Tensor
    prompt: torch.Tensor
    y: torch.Tensor
    user: torch.Tensor
    users: tuple[str, ...]
    k: int
    temperature: float
    scale: float = 1.0
    loss: Loss = "cross_entropy"
    ideal: IdealPoint | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.y.device

    @property
    def width(self) -> int:
        """Numbers per product, m."""
        return self.products.shape[2]

    @property
    def signs(self) -> torch.Tensor:
        """How the sides' rewards make a margin: right minus left, (2,), or the difference as it is, (1,)."""
        return self.products.new_tensor([1.0] if self.products.shape[1] == 1 else [-1.0, 1.0])

    @property
    def counts(self) -> torch.Tensor:
        """Number of comparisons of each user, (u,) int64."""
        return torch.bincount(self.user, minlength=len(self.users))

    def take(self, rows: torch.Tensor) -> ReducedComparisons:
        """Return some of the comparisons, of the same users."""
        names = ("products", "squares", "prompt", "y", "user")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def calibrated(self, noise: float) -> ReducedComparisons:
        """Return the comparisons with margins divided by `noise`, so that P(y = +1) is the sigmoid of a margin."""
        return replace(self, scale=self.scale / noise)

    def points(self, mixtures: torch.Tensor) -> torch.Tensor:
        """Return ideal points in the space of the products, (..., k) -> (..., m)."""
        return mixtures if self.ideal is None else self.ideal(mixtures)

    def margins(self, mixtures: torch.Tensor) -> torch.Tensor:
        """Return r(response_2) - r(response_1) under a mixture per user, (u, k) -> (n,)."""
        points = self.points(mixtures.to(self.products))[self.user]
        t = (self.products @ points.unsqueeze(-1)).squeeze(-1)
        grams = self.grams[0] if len(self.grams) == 1 else self.grams[self.prompt]
        turned = points @ grams if grams.dim() == 2 else (grams @ points.unsqueeze(-1)).squeeze(-1)
        return self._margins(t, (points * turned).sum(-1, keepdim=True), self.squares)

    def margins_at(self, mixtures: torch.Tensor) -> torch.Tensor:
        """Return every comparison's margin under every one of some mixtures, (s, k) -> (n, s)."""
        points = self.points(mixtures.to(self.products))
        t = (self.products @ points.T).transpose(1, 2)
        grams = self.grams if len(self.grams) == 1 else self.grams[self.prompt]
        return self._margins(t, quadratic(grams, points).unsqueeze(-1), self.squares.unsqueeze(1))

    def _margins(self, t: torch.Tensor, q: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return self.scale * (reward(self.kind, t, q, n) @ self.signs)


def quadratic(grams: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return a' M a of every Gram matrix at every point: (..., g, m, m), (..., s, m) -> (..., g, s)."""
    if grams.shape[-3] == 1:
        return ((points @ grams.squeeze(-3)) * points).sum(-1).unsqueeze(-2)
    outer = (points.unsqueeze(-1) * points.unsqueeze(-2)).flatten(-2)
    return grams.flatten(-2) @ outer.transpose(-1, -2)


def float64_device(device: torch.device) -> torch.device:
    """Return the device itself, or the CPU for one that has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def is_reducible(shape: Head) -> TypeGuard[Adaptable]:
    """Return whether new users can be adapted on a head: its users are softmax mixtures of prototypes."""
    if isinstance(shape, LowRank):
        return shape.weights == "simplex"
    return isinstance(shape, PalA | PalB) and shape.mixture in _SOFT


def require_reducible(shape: Head) -> Adaptable:
    """Return the shape of a head that new users can be adapted on; raise InputError for any other."""
    if is_reducible(shape):
        return shape
    values = head_to_dict(shape)
    described = ", ".join(str(values[name]) for name in ("head", "mixture", "weights") if name in values)
    raise InputError(
        f"This head ({described}) has no users to adapt: expected mixtures of prototypes, that is pal-b or pal-a with "
        "--mixture softmax or gumbel, or low-rank with --user-weights simplex; train one with palcache train-head."
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
    shape, parameters = require_reducible(head.shape), head.parameters
    kind = "linear" if isinstance(shape, LowRank) else _KINDS[shape.score]
    used, pair = torch.unique(torch.stack([data.response_1, data.response_2], dim=1), return_inverse=True)
    where = float64_device(data.device)
    chunks = [_items(shape, parameters, data.responses.take(at), kind) for at in torch.split(used, REDUCE_ROWS)]
    items = torch.cat([chunk.to(where).double() for chunk in chunks]) if chunks else _nothing(shape, where)
    pair, ideal = pair.to(where), None
    if isinstance(shape, PalB):
        prompt, (products, grams) = _by_prompt(shape, parameters, data, items, pair, kind)
    else:
        prompt = torch.zeros(len(data), dtype=torch.int64, device=where)
        if isinstance(shape, PalA) and shape.user_form == "f(Pw)":
            ideal = _projected(shape, parameters, where)
            grams = torch.eye(shape.p, dtype=torch.float64, device=where).unsqueeze(0)
            products = _sides(items, pair, kind)
        else:
            prototypes = _prototypes(shape, parameters).to(where).double()
            grams, products = (prototypes @ prototypes.T).unsqueeze(0), _sides(items @ prototypes.T, pair, kind)
    squares = items.square().sum(-1)[pair] if kind not in ONE_SIDED else torch.zeros_like(products[..., 0])
    unscaled = isinstance(shape, PalA | PalB) and shape.score in _UNSCALED
    return ReducedComparisons(
        kind, products, squares, grams, prompt, data.y.to(where).double(), data.user.to(where), data.users, shape.k,
        shape.temperature, 1.0 if unscaled else float(scale(parameters)), shape.loss, ideal,
    )  # fmt: skip


def _items(shape: Adaptable, parameters: Parameters, x: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return items as the score compares them, (m, d) -> (m, p), or (m, d) for linear rewards."""
    if isinstance(shape, LowRank):
        return x
    items = shape.project_responses(parameters, x)
    return items if kind == "distance" else unit(items)


def _nothing(shape: Adaptable, where: torch.device) -> torch.Tensor:
    return torch.empty(0, shape.d if isinstance(shape, LowRank) else shape.p, dtype=torch.float64, device=where)


def _prototypes(shape: PalA | LowRank, parameters: Parameters) -> torch.Tensor:
    """Return the prototypes that ideal points are mixtures of, (k, p)."""
    if isinstance(shape, LowRank):
        return parameters["basis"]
    return shape.ideal_points(parameters, torch.eye(shape.k, device=parameters["prototypes"].device))


def _projected(shape: PalA, parameters: Parameters, where: torch.device) -> IdealPoint:
    """Return the ideal points of mixtures, in float64 on a device."""
    wide = {
        name: value.to(where).double() if value.is_floating_point() else value.to(where)
        for name, value in parameters.items()
    }

    def ideal(mixtures: torch.Tensor) -> torch.Tensor:
        rows = shape.ideal_points(wide, mixtures.reshape(-1, shape.k))
        return rows.reshape(*mixtures.shape[:-1], shape.p)

    return ideal


def _sides(rows: torch.Tensor, pair: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return both sides' rows, (n, 2, m), or right minus left, (n, 1, m)."""
    if kind in ONE_SIDED:
        return (rows[pair[:, 1]] - rows[pair[:, 0]]).unsqueeze(1)
    return rows[pair]


def _by_prompt(
    shape: PalB, parameters: Parameters, data: PreferenceData, items: torch.Tensor, pair: torch.Tensor, kind: Kind
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return each comparison's prompt among those used, and its products and their Gram matrices."""
    used, prompt = torch.unique(data.prompt, return_inverse=True)
    n, k, where = len(data), shape.k, items.device
    products = torch.empty(n, 1 if kind in ONE_SIDED else 2, k, dtype=torch.float64, device=where)
    grams = torch.empty(len(used), k, k, dtype=torch.float64, device=where)
    prompt = prompt.to(where)
    order = torch.argsort(prompt, stable=True)
    first = 0
    for at in torch.split(used, max(1, REDUCE_CELLS // (k * shape.p))):
        prototypes = shape.project_prompts(parameters, data.prompts.take(at)).to(where).double()  # (k, P, p)
        by_prompt = prototypes.transpose(0, 1)
        grams[first : first + len(at)] = by_prompt @ by_prompt.transpose(1, 2)
        edges = torch.tensor([first, first + len(at)], device=where)
        start, end = torch.searchsorted(prompt[order], edges).tolist()
        for rows in torch.split(order[start:end], max(1, REDUCE_CELLS // (2 * shape.p))):
            sides = _sides(items, pair[rows], kind)
            for j in range(k):
                products[rows, :, j] = (sides @ prototypes[j][prompt[rows] - first].unsqueeze(-1)).squeeze(-1)
        first += len(at)
    return prompt, (products, grams)
