"""PAL-B: a user's ideal response depends on the prompt and is a mixture of k shared prototypes.

`a_u(prompt) = sum_j w_uj g_j(prompt)` and `r(response) = exp(logit_scale) cos(f(response), a_u(prompt))`
(Chen et al., "PAL: Sample-Efficient Personalized Reward Modeling for Pluralistic Alignment", ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, final

import torch
import torch.nn.functional as F

from palcache.configs import HeadConfig
from palcache.heads.mixtures import softmax_mixtures
from palcache.heads.projectors import Parameters, Projector
from palcache.tensors import PairBatch

MAX_SCALE: Final = 100.0
"""The published clamp of exp(logit_scale)."""
INITIAL_SCALE: Final = 1 / 0.07
"""The published start of exp(logit_scale)."""
SPREAD: Final = 0.1
"""Size of the prototypes' initial differences, as a share of an ordinary initialisation."""


@final
@dataclass(frozen=True, slots=True)
class PalB:
    """The shape of a PAL-B head; its parameters are handed to each method, so that many heads share one shape.

    Attributes:
        d: width of the encoder's vectors.
        p: width of the preference space.
        k: number of prototypes.
        users: number of users, u.
        projector: name of the projectors in the grammar of `palcache.heads.projectors`.
        temperature: of the softmax over user weights.
    """

    d: int
    p: int
    k: int
    users: int
    projector: str
    temperature: float

    @classmethod
    def from_config(cls, config: HeadConfig, *, d: int, users: int) -> PalB:
        """Build the shape for an encoder of width d and a number of users.

        Raises:
            InputError: the projector does not fit the widths.
        """
        head = cls(d, config.p or d, config.k, users, config.projector, config.temperature)
        head.items, head.prototypes  # noqa: B018 - refuses a projector that does not fit
        return head

    @property
    def items(self) -> Projector:
        """f, of responses."""
        return Projector.parse(self.projector, d=self.d, p=self.p)

    @property
    def prototypes(self) -> Projector:
        """g_1 ... g_k, of prompts."""
        return Projector.parse(self.projector, d=self.d, p=self.p, copies=self.k)

    def initial(self, generator: torch.Generator) -> Parameters:
        """Draw parameters: `f.*`, `g.*` (leading axis k), `user.logits` (u, k) and `logit_scale` ().

        The prototypes begin as one shared map with small differences that sum to zero, and every user in the middle of
        the simplex, so that users part along what the data says and not along a random start. With the published start
        (independent prototypes, user weights from N(0, 1)) some seeds end in bad optima; `docs/defaults.md` has the
        numbers.
        """
        f = {f"f.{name}": value for name, value in self.items.initial(generator).items()}
        base = replace(self.prototypes, copies=1).initial(generator)
        drawn = self.prototypes.initial(generator)
        g = {f"g.{name}": base[name] + SPREAD * (value - value.mean(0)) for name, value in drawn.items()}
        scale = torch.tensor(math.log(INITIAL_SCALE))
        return {**f, **g, "user.logits": torch.zeros(self.users, self.k), "logit_scale": scale}

    def mixtures(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return every user's mixture, (u, k)."""
        return softmax_mixtures(parameters["user.logits"], self.temperature)

    def project_responses(
        self, parameters: Mapping[str, torch.Tensor], x: torch.Tensor, noise: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return f of response vectors, (R, d) -> (R, p)."""
        return self.items(_part(parameters, "f."), x, noise)

    def project_prompts(
        self, parameters: Mapping[str, torch.Tensor], x: torch.Tensor, noise: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return g_1 ... g_k of prompt vectors, (P, d) -> (k, P, p)."""
        return self.prototypes(_part(parameters, "g."), x, noise)

    def margins(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        *,
        mixtures: torch.Tensor | None = None,
        noise: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Return r(response_2) - r(response_1), (n,); positive predicts y = +1.

        Args:
            parameters: as `initial` draws them.
            batch: the comparisons.
            mixtures: one mixture per comparison, (n, k); None takes the head's own users.
            noise: draws dropout in training; None in evaluation.
        """
        if mixtures is None:
            mixtures = F.embedding(batch.user, self.mixtures(parameters))
        items = F.normalize(self.project_responses(parameters, batch.responses, noise), dim=-1)
        ideal = self.ideal_points(self.project_prompts(parameters, batch.prompts, noise), batch.prompt, mixtures)
        difference = F.embedding(batch.response_2, items) - F.embedding(batch.response_1, items)
        return scale(parameters) * (difference * F.normalize(ideal, dim=-1)).sum(-1)

    def ideal_points(self, prototypes: torch.Tensor, prompt: torch.Tensor, mixtures: torch.Tensor) -> torch.Tensor:
        """Return a_u(prompt) per comparison, (n, p).

        Args:
            prototypes: g_j of the distinct prompts, (k, P, p).
            prompt: row of each comparison's prompt, (n,).
            mixtures: (n, k).
        """
        if self.k == 1:  # a single prototype: every mixture is 1
            return F.embedding(prompt, prototypes[0])
        ideal = F.embedding(prompt, prototypes[0]) * mixtures[:, :1]
        for j in range(1, self.k):
            ideal = torch.addcmul(ideal, F.embedding(prompt, prototypes[j]), mixtures[:, j : j + 1])
        return ideal


def scale(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return exp(logit_scale), at most 100, ()."""
    return parameters["logit_scale"].exp().clamp(max=MAX_SCALE)


def _part(parameters: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
