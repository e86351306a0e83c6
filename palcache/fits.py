"""What one training and one stack of trainings have in common: what they refuse, how they stop, what they report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, final

import torch

from palcache.checkpoints import HistoryRow
from palcache.choices import EMBED_JOINT, EMBED_JOINT_TOKENS, EMBED_TOKENS, PromptAlignment
from palcache.configs import FitConfig
from palcache.errors import InputError, NumericsError
from palcache.heads import Head, IdealPointHead, Parameters
from palcache.heads.protocols import group_of
from palcache.losses import rounded_sum
from palcache.objectives import TrainingData
from palcache.optimizers import rate_factor
from palcache.token_batches import TokenData

WORK_PER_THREAD: Final = 1 << 26
"""Multiply-adds of a step's forward pass that keep one CPU thread busy. With smaller shares threads mostly wait for each
other, and where the cores are shared with other work every operation waits for the slowest of them."""


@final
@dataclass(frozen=True, slots=True)
class FitProgress:
    """What `fit` reports after each evaluation.

    Attributes:
        row: the evaluation.
        steps: steps in all.
        comparisons_per_second: rate of training since the last evaluation.
        rule: `head`, or `user_blind` while a run trains its yardstick.
    """

    row: HistoryRow
    steps: int
    comparisons_per_second: float
    rule: Literal["head", "user_blind"] = "head"


@final
@dataclass(frozen=True, slots=True, eq=False)
class FitResult:
    """A trained head's parameters and how they came about.

    Attributes:
        parameters: at the step of the lowest validation loss.
        history: every evaluation.
        best_step: that step.
        stopped_early: training ended for lack of progress.
        seconds: wall time of this call.
    """

    parameters: Parameters
    history: tuple[HistoryRow, ...]
    best_step: int
    stopped_early: bool
    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Course:
    """The steps of a training, and where validation is measured.

    Attributes:
        steps_per_epoch: so many; their batches differ by one comparison at most.
        steps: in all.
        evaluations: so many, evenly over the steps.
    """

    steps_per_epoch: int
    steps: int
    evaluations: int

    @classmethod
    def of(cls, config: FitConfig, comparisons: int) -> Course:
        """Return the course of a training on so many comparisons."""
        steps_per_epoch = -(-comparisons // config.batch_size)
        return cls(steps_per_epoch, steps_per_epoch * config.total_epochs(comparisons), config.evaluations)

    def next_evaluation(self, step: int) -> int:
        """Return the step of the next evaluation after so many steps."""
        number = step * self.evaluations // self.steps + 1
        return -(-number * self.steps // self.evaluations)

    def place(self, step: int) -> str:
        """Return how people count a step (from 0)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return f"step {step + 1} (epoch {epoch + 1}, batch {batch + 1})"


def multiply_adds(parameters: Mapping[str, torch.Tensor], n: int) -> int:
    """Return those of a forward pass over n comparisons, at most: two responses and k prompts of each.

    Args:
        parameters: of one head, or of a stack of them.
        n: comparisons.
    """
    sizes = {name: value.numel() for name, value in parameters.items() if group_of(name) == "projectors"}
    prompts = sum(size for name, size in sizes.items() if name.startswith("g."))
    return n * (2 * (sum(sizes.values()) - prompts) + prompts)


def check_fit(shape: Head, train: TrainingData, val: TrainingData, config: FitConfig) -> None:
    """Refuse data that a head cannot be trained on.

    Raises:
        InputError: a split is empty, or its vectors or users do not fit the head or the loss.
    """
    for name, data in (("training", train), ("validation", val)):
        if not len(data):
            raise InputError(f"There are no {name} comparisons; split the table anew with palcache embed --split-by.")
        if data.width != shape.d:
            raise InputError(f"The {name} vectors have width {data.width}; the head expects {shape.d}.")
        if len(data.users) != shape.users:
            raise InputError(
                f"The {name} comparisons are numbered for {len(data.users)} users, the head for {shape.users}; number them "
                "as the head's with with_users."
            )
        alignment = data.alignment if isinstance(data, TokenData) else None
        require_vectors(shape, config, joint=data.joint, alignment=alignment)
    if int(train.user.min()) < 0:
        raise InputError(
            "A training comparison is of a user whom the head does not have; build the head for its users."
        )


def require_vectors(shape: Head, config: FitConfig, *, joint: bool, alignment: PromptAlignment | None) -> None:
    """Refuse a head or a loss that needs other vectors than there are, naming the command that makes them.

    Args:
        shape: the head.
        config: how it is to be trained.
        joint: the vectors are of prompt and response in one forward.
        alignment: what the tokens of responses meet, where there is a vector at every token; None where there is none.

    Raises:
        InputError: they do not fit.
    """
    if shape.joint and not joint:
        raise InputError(
            "PAL-A reads vectors of prompt and response in one forward, and these are of each alone; make them with "
            f"{EMBED_JOINT}."
        )
    weighting, tokens = config.token_weighting, alignment is not None
    if weighting is not None and not tokens:
        command = EMBED_JOINT_TOKENS if shape.joint else EMBED_TOKENS
        raise InputError(
            f"The token loss {weighting} needs a vector at every token, and the cache is pooled; make them with "
            f"{command}, or leave out --token-weighting."
        )
    if weighting is None and tokens:
        raise InputError("The vectors are of every token; choose --token-weighting mean, cumulative or only_last.")
    if tokens and not joint and alignment != config.prompt_alignment:
        raise InputError(
            f"The prompt alignment {config.prompt_alignment} is asked for, and the data has {alignment}; load them alike."
        )
    if not isinstance(shape, IdealPointHead) and (tokens or config.bound_weight):
        what = "token losses" if tokens else "the bound of ideal points"
        raise InputError(f"Only pal-a and pal-b have {what}; choose one of them with --head.")


def stalled(history: Sequence[HistoryRow], config: FitConfig) -> bool:
    """Return whether the last evaluations brought no lower validation loss, as many as `patience` allows."""
    if not config.patience or not history:
        return False
    best = min(range(len(history)), key=lambda i: history[i].val_loss)
    return len(history) - 1 - best >= config.patience


def require_finite(val_loss: float, row: HistoryRow, course: Course) -> None:
    """Refuse a validation loss that is not finite, measured in the course of a training.

    Raises:
        NumericsError: it is not.
    """
    if not math.isfinite(val_loss):
        raise NumericsError(
            f"The validation loss is {val_loss} after {course.place(row.step - 1)} with learning rate {row.lr:.2e}; "
            "lower --lr."
        )


def require_finite_losses(losses: torch.Tensor, config: FitConfig, first: int, course: Course) -> None:
    """Refuse losses that are not finite, naming the first.

    Args:
        losses: of successive steps, (s,).
        config: how the head is trained.
        first: number of the first of these steps, from 0.
        course: all of them.

    Raises:
        NumericsError: one is not finite.
    """
    if bool(torch.isfinite(losses).all()):
        return
    bad = int(torch.nonzero(~torch.isfinite(losses))[0])
    step = first + bad
    rate = rate_factor(config, step, course.steps) * config.lr
    raise NumericsError(
        f"The loss is {float(losses[bad])} at {course.place(step)} with learning rate {rate:.2e}; lower --lr."
    )


def mean_loss(losses: torch.Tensor) -> float:
    """Return the mean of some losses, (s,), as `rounded_sum` adds them."""
    return rounded_sum(losses) / len(losses)


@contextmanager
def few_threads(work: int, device: torch.device) -> Iterator[None]:
    """Use no more CPU threads than a step's multiply-adds keep busy."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, min(before, work // WORK_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
