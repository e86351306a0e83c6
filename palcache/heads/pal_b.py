"""PAL-B: a user's ideal response depends on the prompt and is a mixture of k shared prototypes.

`a_u(prompt) = sum_j w_uj g_j(prompt)`, and by default `r(response) = exp(logit_scale) cos(f(response), a_u(prompt))`; the
other scores are in `palcache.heads.scores` (Chen et al., "PAL: Sample-Efficient Personalized Reward Modeling for Pluralistic
Alignment", ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
import torch.nn.functional as F

from palcache.choices import Mixture, Score, Start
from palcache.configs import HeadConfig
from palcache.heads.ideal_points import SPREAD, IdealPointShape, per_pair, project, row_noise
from palcache.heads.projectors import Parameters, Projector
from palcache.heads.scores import initial_scale
from palcache.noises import Noise, RowNoise
from palcache.tensors import PairBatch


@final
@dataclass(frozen=True, slots=True)
class PalB(IdealPointShape):
    """The shape of a PAL-B head; its parameters are handed to each method, so that many heads share one shape.

    Attributes:
        d: width of the encoder's vectors.
        p: width of the preference space.
        k: number of prototypes.
        users: number of users, u.
        projector: name of the projectors in the grammar of `palcache.heads.projectors`.
        temperature: of the softmax over user weights.
        score: how an item and an ideal point make a reward.
        mixture: how user weights become a point of the simplex.
        start: how parameters are drawn, see `initial`.
    """

    d: int
    p: int
    k: int
    users: int
    projector: str
    temperature: float
    score: Score = "angle"
    mixture: Mixture = "softmax"
    start: Start = "shared"

    @classmethod
    def from_config(cls, config: HeadConfig, *, d: int, users: int) -> PalB:
        """Build the shape for an encoder of width d and a number of users.

        Raises:
            InputError: the projector does not fit the widths.
        """
        name, score = config.projector, config.score or "angle"
        head = cls(d, config.p or d, config.k, users, name, config.temperature, score, config.mixture, config.start)
        head.items, head.prototypes  # noqa: B018 - refuses a projector that does not fit
        return head

    @property
    def joint(self) -> bool:
        """Responses are read alone."""
        return False

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
        (independent prototypes, user weights from N(0, 1)), which `start = "published"` draws, some seeds end in bad
        optima; `docs/defaults.md` has the numbers.
        """
        f = {f"f.{name}": value for name, value in self.items.initial(generator).items()}
        base = replace(self.prototypes, copies=1).initial(generator)
        drawn = self.prototypes.initial(generator)
        logits = torch.zeros(self.users, self.k)
        if self.start == "published":
            g = {f"g.{name}": value for name, value in drawn.items()}
            logits = torch.randn(self.users, self.k, generator=generator)
        else:
            g = {f"g.{name}": _spread(base[name], value) for name, value in drawn.items()}
        return {**f, **g, "user.logits": logits, "logit_scale": initial_scale()}

    def project_prompts(
        self,
        parameters: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        noise: RowNoise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Return g_1 ... g_k of prompt vectors, (m, d) -> (k, m, p)."""
        return project(self.prototypes, "g.", parameters, x, noise, updates)

    def batch_ideals(
        self,
        parameters: Mapping[str, torch.Tensor],
        batch: PairBatch,
        mixtures: torch.Tensor,
        noise: Noise | None,
        updates: Parameters | None,
    ) -> torch.Tensor:
        """Return the ideal points of a batch, (n, p), or (m, p) where each pair of rows has a prompt of its own."""
        prompts, prompt, names = batch.prompts, batch.prompt, batch.prompt_names
        if len(prompt) != len(mixtures):
            mixtures = per_pair(mixtures, batch)
        if self.prototypes.batchnorm and updates is not None:  # statistics of the comparisons, not of distinct prompts
            prompts, names = prompts[prompt], prompt if names is None else names[prompt]
            prompt = torch.arange(len(prompt), device=prompts.device)
        drawn = row_noise(noise, "prototypes", prompts, names)
        prototypes = self.project_prompts(parameters, prompts, drawn, updates)
        return self.ideal_points(prototypes, prompt, mixtures)

    def ideal_points(self, prototypes: torch.Tensor, prompt: torch.Tensor, mixtures: torch.Tensor) -> torch.Tensor:
        """Return a_u(prompt) per comparison, (n, p), or per pair of rows.

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


def _spread(base: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Return k copies of a start with small differences that sum to zero; counts of batchnorms stay as they are."""
    return base + SPREAD * (drawn - drawn.mean(0)) if drawn.is_floating_point() else drawn
