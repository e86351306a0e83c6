"""PAL-A: items are prompt and response together, and a user's ideal point is made of k shared prototypes P.

| user form | ideal point | P |
|---|---|---|
| `f(Pw)` | f of the mixture | (k, d) |
| `f(P)w` | mixture of f of the prototypes | (k, d) |
| `Pw` | the mixture itself | (k, p) |
| `|f(P)|w` | mixture of f of the prototypes, each of norm 1 | (k, d) |

Published with `f(Pw)` and `r(item) = -|f(item) - a_u|` (Chen et al., "PAL: Sample-Efficient Personalized Reward Modeling
for Pluralistic Alignment", ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from palcache.choices import Mixture, Score, Start, UserForm
from palcache.configs import HeadConfig
from palcache.heads.ideal_points import SPREAD, IdealPointShape, project, row_noise
from palcache.heads.projectors import Parameters, Projector
from palcache.heads.scores import initial_scale, unit
from palcache.noises import Noise
from palcache.tensors import PairBatch


@final
@dataclass(frozen=True, slots=True)
class PalA(IdealPointShape):
    """The shape of a PAL-A head; its parameters are handed to each method, so that many heads share one shape.

    Attributes:
        d: width of the encoder's vectors.
        p: width of the preference space.
        k: number of prototypes.
        users: number of users, u.
        projector: name of the projector in the grammar of `palcache.heads.projectors`.
        temperature: of the softmax over user weights.
        score: how an item and an ideal point make a reward.
        user_form: how an ideal point is made.
        mixture: how user weights become a point of the simplex.
        start: how parameters are drawn, see `initial`.
    """

    d: int
    p: int
    k: int
    users: int
    projector: str
    temperature: float
    score: Score = "dist"
    user_form: UserForm = "f(Pw)"
    mixture: Mixture = "softmax"
    start: Start = "shared"

    @classmethod
    def from_config(cls, config: HeadConfig, *, d: int, users: int) -> PalA:
        """Build the shape for an encoder of width d and a number of users.

        Raises:
            InputError: the projector does not fit the widths.
        """
        head = cls(
            d,
            config.p or d,
            config.k,
            users,
            config.projector,
            config.temperature,
            config.score or "dist",
            config.user_form,
            config.mixture,
            config.start,
        )
        head.items  # noqa: B018 - refuses a projector that does not fit
        return head

    @property
    def joint(self) -> bool:
        """Prompt and response are read together."""
        return True

    @property
    def items(self) -> Projector:
        """f, of items and, but for `Pw`, of prototypes."""
        return Projector.parse(self.projector, d=self.d, p=self.p)

    def initial(self, generator: torch.Generator) -> Parameters:
        """Draw parameters: `f.*`, `prototypes` (k, d or p), `user.logits` (u, k) and `logit_scale` ().

        Prototypes begin as one Gaussian row of norm 1 with small differences that sum to zero, and every user in the
        middle of the simplex. `start = "published"` draws independent rows of norm 1 and user weights from N(0, 1).
        """
        parameters = {f"f.{name}": value for name, value in self.items.initial(generator).items()}
        width = self.p if self.user_form == "Pw" else self.d
        base = unit(torch.randn(width, generator=generator))
        prototypes = unit(torch.randn(self.k, width, generator=generator))
        logits = torch.zeros(self.users, self.k)
        if self.start == "published":
            logits = torch.randn(self.users, self.k, generator=generator)
        else:
            prototypes = base + SPREAD * (prototypes - prototypes.mean(0))
        return {**parameters, "prototypes": prototypes, "user.logits": logits, "logit_scale": initial_scale()}

    def ideal_points(
        self,
        parameters: Mapping[str, torch.Tensor],
        mixtures: torch.Tensor,
        noise: Noise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return the ideal point of each mixture, (n, k) -> (n, p)."""
        prototypes = parameters["prototypes"]
        if self.user_form == "Pw":
            return mixtures @ prototypes
        rows = mixtures @ prototypes if self.user_form == "f(Pw)" else prototypes
        drawn = row_noise(noise, "ideal points", rows, None)
        projected = project(self.items, "f.", parameters, rows, drawn, updates)
        if self.user_form == "f(Pw)":
            return projected
        return mixtures @ (unit(projected) if self.user_form == "|f(P)|w" else projected)

    def batch_ideals(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,  # noqa: ARG002 - ideal points are the same at every prompt
        mixtures: torch.Tensor,
        noise: Noise | None,
        updates: Parameters | None,
    ) -> torch.Tensor:
        """Return the ideal points of a batch, (n, p); prompts are not read."""
        return self.ideal_points(parameters, mixtures, noise, updates)
