"""Which heads are trained together: of one kind, few enough for the device's memory, spread over jobs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Final

import torch

from palcache.devices import free_cached_memory, free_memory, is_out_of_memory
from palcache.errors import InputError, NumericsError, PalcacheError, PalcacheWarning
from palcache.fits import FitProgress, FitResult
from palcache.objectives import TrainingData
from palcache.stacks import Member, StackProgress, fit_stack
from palcache.tensors import MEMORY_SHARE, PreferenceData
from palcache.training import fit

HEADS_ON_CPU: Final = 64
"""At most so many heads in a stack on a CPU: larger ones gain nothing, and their results come later."""
HEADS_PER_JOB: Final = 8
"""A kind of heads is spread over jobs in stacks of at least so many: smaller ones cost more than a job gains."""
_STATES: Final = 6
"""Copies of a head's parameters in training: themselves, gradients twice, two moments, the best."""
_ACTIVATIONS: Final = 24
"""Numbers of width p that a step keeps of each projected row: layers, noise and gradients."""


def plan_stacks(members: Sequence[Member], train: TrainingData, *, jobs: int = 1) -> list[list[int]]:
    """Return which members are trained together, by their numbers; those solved at once, or on tokens, stand alone.

    Args:
        members: the heads.
        train: their training comparisons.
        jobs: stacks that are trained side by side.
    """
    kinds: dict[object, list[int]] = {}
    for number, member in enumerate(members):
        alone = (number,) if member.shape.closed_form or member.config.token_weighting else ()
        kinds.setdefault((member.kind(len(train)), *alone), []).append(number)
    stacks = []
    for numbers in kinds.values():
        numbers.sort(key=lambda i: (_rates(members[i]), i))
        size = min(len(numbers), heads_that_fit(members[numbers[0]], train))
        if len(kinds) < jobs:
            size = min(size, max(HEADS_PER_JOB, math.ceil(len(numbers) / jobs)))
        parts = math.ceil(len(numbers) / size)
        cuts = [len(numbers) * part // parts for part in range(parts + 1)]
        stacks += [numbers[first:last] for first, last in zip(cuts[:-1], cuts[1:], strict=True)]
    return stacks


def _rates(member: Member) -> tuple[float | str, ...]:
    """Return what neighbours in a stack should share: then one call of the optimizer steps them."""
    config = member.config
    return (config.schedule, config.warmup, config.lr, config.weight_decay, config.lr_users, config.lr_prototypes)


def heads_that_fit(member: Member, train: TrainingData) -> int:
    """Return how many heads of a kind fit the memory of the data's device by estimate, at least one."""
    shape, n = member.shape, min(member.config.batch_size, len(train))
    with torch.device("meta"):  # sizes alone: what fits no memory is found out where it is trained
        values = sum(value.numel() for value in shape.initial(torch.Generator("cpu")).values())
    rows, width = n * (2 + shape.k), int(getattr(shape, "p", 1))
    needed = 4 * (_STATES * values + rows * (shape.d + _ACTIVATIONS * width))
    most = int(MEMORY_SHARE * free_memory(train.device)) // needed
    return max(1, min(most, HEADS_ON_CPU) if train.device.type == "cpu" else most)


def fit_members(
    members: Sequence[Member],
    train: TrainingData,
    val: TrainingData,
    *,
    on_progress: Callable[[StackProgress], None] | None = None,
) -> list[FitResult | PalcacheError]:
    """Train a stack; where memory runs out, train its halves one after the other, and say so once.

    A head that does not fit the memory alone, or cannot be solved, gets its error in its place.

    Args:
        members: of one kind; a single one is trained by `fit`.
        train: training comparisons.
        val: validation comparisons.
        on_progress: called after each evaluation.
    """
    if len(members) == 1:
        return [_fit_alone(members[0], train, val, on_progress)]
    assert isinstance(train, PreferenceData) and isinstance(val, PreferenceData)  # noqa: S101, PT018 - see `plan_stacks`
    try:
        return [*fit_stack(members, train, val, on_progress=on_progress)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()  # here the error is gone, and with it the frames that hold the stack's tensors
    half = len(members) // 2
    warnings.warn(  # the text is the same each time, so that it is shown once
        f"Not all heads of a kind fit the memory of {train.device} at once; smaller groups are trained.",
        PalcacheWarning,
        stacklevel=2,
    )
    parts = (members[:half], members[half:])
    return [result for part in parts for result in fit_members(part, train, val, on_progress=on_progress)]


def _fit_alone(
    member: Member,
    train: TrainingData,
    val: TrainingData,
    on_progress: Callable[[StackProgress], None] | None,
) -> FitResult | PalcacheError:
    def relay(event: FitProgress) -> None:
        if on_progress:
            on_progress(StackProgress(event.row.step, event.steps, 1, ()))

    try:
        return fit(member.shape, train, val, member.config, on_progress=relay)
    except NumericsError as error:
        return error
    except torch.linalg.LinAlgError as error:
        return NumericsError(f"The head cannot be solved on these comparisons ({error}); choose another --head.")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()
    return no_room(member, train.device)


def no_room(member: Member, device: torch.device) -> InputError:
    """Return the error of a head that does not fit the memory of a device."""
    width = f"p = {p} and " if (p := getattr(member.shape, "p", None)) else ""
    return InputError(
        f"A head of {width}batch_size = {member.config.batch_size} does not fit the memory of {device}; lower p or "
        "batch_size."
    )
