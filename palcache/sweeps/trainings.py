"""What must be trained for which heads of a sweep: heads themselves, and yardsticks that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from palcache.checkpoints import load_head
from palcache.configs import FitConfig, HeadConfig
from palcache.heads import Parameters, blind_config, build_head
from palcache.objectives import TrainingData
from palcache.runs.trainings import is_blind
from palcache.stacks import Member
from palcache.sweeps.folders import Trial

_DEFAULT: Final = FitConfig()
Source = tuple[int | None, bool, str | None]
"""Seed of the split, whether items are joint, and of token states what they are aligned with."""


@final
@dataclass(frozen=True, slots=True)
class Training:
    """One training: of a head, of a yardstick, or of both at once."""

    head: HeadConfig
    fit: FitConfig
    split_seed: int | None

    @classmethod
    def of(cls, trial: Trial) -> Training:
        """Return the training of a head; what one prototype has no use for is left out."""
        head, fit = trial.head, trial.fit
        if head.k == 1 and head.head in {"pal-a", "pal-b"}:
            head = replace(head, mixture="softmax", temperature=1.0)
            fit = replace(fit, lr_users=_DEFAULT.lr_users)
        return cls(head, fit, trial.split_seed)

    def member(self, train: TrainingData) -> Member:
        """Return it as a member of a stack."""
        return Member(build_head(self.head, d=train.width, users=len(train.users)), self.fit)


@final
@dataclass(frozen=True, slots=True)
class Pending:
    """A head whose run is not written yet: its own training and that of its yardstick."""

    trial: Trial
    own: Training
    blind: Training

    @classmethod
    def of(cls, trial: Trial) -> Pending:
        """Return what a head needs; a head that is blind itself is its own yardstick."""
        own = Training.of(trial)
        if is_blind(build_head(trial.head, d=trial.width, users=2), trial.head):
            return cls(trial, own, own)
        return cls(trial, own, Training.of(replace(trial, head=blind_config(trial.head))))


def source_of(fit: Training) -> Source:
    """Return what decides which data a training needs."""
    tokens = fit.fit.prompt_alignment if fit.fit.token_weighting else None
    return fit.split_seed, fit.head.head == "pal-a", tokens


def known_yardsticks(complete: Sequence[Trial], pending: Sequence[Pending]) -> dict[Training, Parameters]:
    """Return the yardsticks of complete runs that pending heads need too."""
    needed = {one.blind for one in pending if one.blind != one.own}
    paths = {Pending.of(trial).blind: trial.path for trial in complete}
    return {fit: load_head(path / "user_blind.safetensors").parameters for fit, path in paths.items() if fit in needed}
