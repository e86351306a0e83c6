"""Yardsticks with the interface of a head, trained step by step: rewards without ideal points.

`BradleyTerry` gives everyone the same reward (Bradley and Terry, 1952). `LowRank` gives each user a mixture of k shared
linear rewards, on the simplex or free (after "LoRe: Personalizing LLMs via Low-Rank Reward Modeling", Bose et al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from palcache.choices import Loss, UserWeights
from palcache.configs import HeadConfig
from palcache.heads.ideal_points import project_items
from palcache.heads.mixtures import softmax_mixtures
from palcache.heads.projectors import Parameters, Projector
from palcache.heads.scores import initial_scale, lookup, scale
from palcache.noises import Noise
from palcache.tensors import PairBatch


class Yardstick:
    """Base of the shapes of yardsticks: responses are read alone, and the logistic loss is the likelihood of the model.

    Abstract: a yardstick adds its fields, `initial`, `mixtures` and `margins`.

    Attributes:
        joint: never.
        closed_form: it is solved at once; else it is trained step by step, in all its parameters.
        loss: by which it is compared with other heads.
    """

    __slots__ = ()
    joint: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False
    loss: ClassVar[Loss] = "logistic"

    def trains(self, name: str) -> bool:  # noqa: ARG002 - one rule for all names
        """Return whether training changes a parameter: all of them, or none where they are solved."""
        return not self.closed_form


@final
@dataclass(frozen=True, slots=True)
class BradleyTerry(Yardstick):
    """One reward for all: `r(item) = s v . f(item)` with s = exp(logit_scale); linear where f is the identity.

    Attributes:
        d: width of the encoder's vectors.
        p: width of f.
        users: number of users, u; they are all alike.
        projector: name of f in the grammar of `palcache.heads.projectors`.
    """

    d: int
    p: int
    users: int
    projector: str

    @classmethod
    def from_config(cls, config: HeadConfig, *, d: int, users: int) -> BradleyTerry:
        """Build the shape for an encoder of width d and a number of users.

        Raises:
            InputError: the projector does not fit the widths.
        """
        p = d if config.projector == "identity" else config.p or d
        head = cls(d, p, users, config.projector)
        head.items  # noqa: B018 - refuses a projector that does not fit
        return head

    @property
    def k(self) -> int:
        """One prototype: the reward is user-blind."""
        return 1

    @property
    def items(self) -> Projector:
        """f, of responses."""
        return Projector.parse(self.projector, d=self.d, p=self.p)

    def initial(self, generator: torch.Generator) -> Parameters:
        """Draw parameters: `f.*`, `readout` (p,) and `logit_scale` ()."""
        parameters = {f"f.{name}": value for name, value in self.items.initial(generator).items()}
        return {**parameters, "readout": _uniform((self.p,), self.p, generator), "logit_scale": initial_scale()}

    def mixtures(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return every user's mixture, (u, 1): ones."""
        return torch.ones(self.users, 1, device=parameters["logit_scale"].device)

    def margins(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,  # noqa: ARG002 - users are alike
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return r(response_2) - r(response_1), (n,); arguments as for `palcache.heads.Head.margins`."""
        left, right = project_items(self.items, "dist", parameters, batch, noise, updates)
        return scale(parameters) * ((right - left) * parameters["readout"]).sum(-1)


@final
@dataclass(frozen=True, slots=True)
class LowRank(Yardstick):
    """A mixture of k linear rewards for each user: `r_u(item) = s w_u . (V item)` with s = exp(logit_scale).

    Attributes:
        d: width of the encoder's vectors.
        k: number of linear rewards.
        users: number of users, u.
        weights: `simplex`, w_u = softmax(W_u / T); or `free`, w_u = W_u.
        temperature: T above 0, for the simplex.
    """

    d: int
    k: int
    users: int
    weights: UserWeights = "simplex"
    temperature: float = 1.0

    @classmethod
    def from_config(cls, config: HeadConfig, *, d: int, users: int) -> LowRank:
        """Build the shape for an encoder of width d and a number of users."""
        return cls(d, config.k, users, config.user_weights, config.temperature)

    def initial(self, generator: torch.Generator) -> Parameters:
        """Draw parameters: `basis` (k, d), `user.logits` (u, k), all users alike, and `logit_scale` ()."""
        logits = torch.zeros(self.users, self.k)
        if self.weights == "free":
            logits += 1 / self.k
        return {
            "basis": _uniform((self.k, self.d), self.d, generator),
            "user.logits": logits,
            "logit_scale": initial_scale(),
        }

    def mixtures(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return every user's weights over the linear rewards, (u, k)."""
        logits = parameters["user.logits"]
        return logits if self.weights == "free" else softmax_mixtures(logits, self.temperature)

    def margins(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: Noise | None = None,  # noqa: ARG002 - nothing is random
        updates: Parameters | None = None,  # noqa: ARG002 - there are no statistics
    ) -> torch.Tensor:
        """Return r(response_2) - r(response_1), (n,); arguments as for `palcache.heads.Head.margins`."""
        if mixtures is None:
            mixtures = lookup(self.mixtures(parameters), batch.user)
        return scale(parameters) * linear_margins(parameters["basis"], batch, mixtures)


def linear_margins(basis: torch.Tensor, batch: PairBatch, weights: torch.Tensor) -> torch.Tensor:
    """Return w . V (right - left) of each comparison, (n,), projecting each distinct response once.

    Args:
        basis: V, (k, d).
        batch: the comparisons.
        weights: w of each comparison, (n, k).
    """
    rewards = batch.responses @ basis.T
    return ((lookup(rewards, batch.response_2) - lookup(rewards, batch.response_1)) * weights).sum(-1)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> torch.Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
