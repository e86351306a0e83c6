"""What training, evaluation and checkpoints ask of a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Protocol, runtime_checkable

import torch

from palcache.choices import Loss
from palcache.heads.projectors import Parameters, is_buffer
from palcache.noises import Noise
from palcache.tensors import PairBatch, PreferenceData

Group = Literal["projectors", "users", "prototypes", "scale"]
"""Parameters that share a learning rate."""
_GROUPS: Final[Mapping[str, Group]] = {"prototypes": "prototypes", "logit_scale": "scale"}


@runtime_checkable
class Head(Protocol):
    """The shape of a head: a frozen value without tensors; its parameters are handed to each method.

    A pass is one of training where `noise` (dropout and Gumbel noise) or `updates` (it receives new running
    statistics) is given, else one of evaluation. Parameters of heads of one shape may be stacked on a leading axis and
    mapped over (`torch.func.vmap`): no branch depends on a value.
    """

    @property
    def d(self) -> int:
        """Width of the vectors that are read."""

    @property
    def k(self) -> int:
        """Number of prototypes; 1 where the head is user-blind."""

    @property
    def users(self) -> int:
        """Number of users, u."""

    @property
    def joint(self) -> bool:
        """The head reads vectors of prompt and response in one forward."""

    @property
    def closed_form(self) -> bool:
        """The head is solved, not trained step by step."""

    @property
    def loss(self) -> Loss:
        """The loss that its score was published with."""

    def initial(self, generator: torch.Generator) -> Parameters:
        """Draw parameters to start from."""

    def trains(self, name: str) -> bool:
        """Return whether training changes a parameter by its gradient."""

    def mixtures(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return every user's weights in evaluation, (u, k); their mean stands for users who are not known."""

    def margins(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return r(response_2) - r(response_1), (n,); positive predicts y = +1."""


@runtime_checkable
class IdealPointHead(Head, Protocol):
    """A head whose reward compares items with a user's ideal point: on pooled vectors, or at every token of a span."""

    def rewards(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return r(response_1) and r(response_2), (n, 2), or (m, 2) of several pairs of rows a comparison."""

    def points(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return items as the score compares them, left and right, and ideal points as they are, (n, p) each.

        Of comparisons with several pairs of rows, items are (m, p), and ideal points too where each pair has a prompt row
        of its own; `palcache.heads.ideal_points.per_pair` gives each pair one.
        """

    def compare(
        self,
        parameters: Mapping[str, torch.Tensor],
        left: torch.Tensor,
        right: torch.Tensor,
        ideal: torch.Tensor,
    ) -> torch.Tensor:
        """Return r(right) - r(left) of what `points` returned, (...,)."""


@runtime_checkable
class SolvedHead(Head, Protocol):
    """A head that is solved from all training comparisons at once."""

    def solve(self, train: PreferenceData, val: PreferenceData) -> Parameters:
        """Return the parameters; validation chooses what has to be chosen."""


def group_of(name: str) -> Group:
    """Return the group of a parameter by its name."""
    return "users" if name.startswith("user.") else _GROUPS.get(name, "projectors")


def trained_names(head: Head, parameters: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the parameters that training changes by their gradients."""
    return [name for name in parameters if not is_buffer(name) and head.trains(name)]


def parameter_count(head: Head, parameters: Mapping[str, torch.Tensor]) -> int:
    """Return the number of learned values: buffers and fixed scales left out."""
    return sum(parameters[name].numel() for name in trained_names(head, parameters))
