"""Which heads are trained together: of one kind, few enough for the device's memory, spread over jobs."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import torch

from palcache.devices import free_cached_memory, free_memory, is_out_of_memory
from palcache.errors import InputError, NumericsError, PalcacheError, PalcacheWarning
from palcache.fits import Course, FitProgress, FitResult
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


def plan_stacks(
    members: Sequence[Member], train: TrainingData, *, jobs: int = 1, devices: Sequence[str] = ()
) -> list[list[int]]:
    """Return which members are trained together, by their numbers; those solved at once, or on tokens, stand alone.

    Args:
        members: the heads.
        train: their training comparisons.
        jobs: stacks that are trained side by side.
        devices: where, taken by the jobs in turn; by default the data's.
    """
    room = _room([torch.device(name) for name in devices] or [train.device], jobs)
    kinds: dict[object, list[int]] = {}
    for number, member in enumerate(members):
        alone = (number,) if member.shape.closed_form or member.config.token_weighting else ()
        alone = (*alone, member.config.seed) if train.streamed else alone  # what is read ahead has one order
        kinds.setdefault((member.kind(len(train)), *alone), []).append(number)
    stacks = []
    for numbers in kinds.values():
        numbers.sort(key=lambda i: (_rates(members[i]), i))
        size = min(len(numbers), heads_that_fit(members[numbers[0]], train, room))
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


def _room(devices: Sequence[torch.device], jobs: int) -> int:
    """Return the bytes that any of the jobs may take, the least over devices: jobs on one device share its memory."""
    sharing = Counter(devices[job % len(devices)] for job in range(jobs))
    return min(int(MEMORY_SHARE * free_memory(device)) // number for device, number in sharing.items())


def heads_that_fit(member: Member, train: TrainingData, room: int) -> int:
    """Return how many heads of a kind fit so many bytes by estimate, at least one."""
    shape, n = member.shape, min(member.config.batch_size, len(train))
    with torch.device("meta"):  # sizes alone: what fits no memory is found out where it is trained
        values = sum(value.numel() for value in shape.initial(torch.Generator("cpu")).values())
    rows, width = n * (2 + shape.k), int(getattr(shape, "p", 1))
    needed = 4 * (_STATES * values + rows * (shape.d + _ACTIVATIONS * width))
    most = room // needed
    return max(1, min(most, HEADS_ON_CPU) if train.device.type == "cpu" else most)


def _warn(text: str) -> None:
    warnings.warn(text, PalcacheWarning, stacklevel=3)


def fit_members(
    members: Sequence[Member],
    train: TrainingData,
    val: TrainingData,
    *,
    on_steps: Callable[[int], None] | None = None,
    on_halves: Callable[[str], None] = _warn,
) -> list[FitResult | PalcacheError]:
    """Train a stack; where memory runs out, train its halves one after the other, and say so.

    A head that does not fit the memory alone, or cannot be solved, gets its error in its place.

    Args:
        members: of one kind; a single one is trained by `fit`.
        train: training comparisons.
        val: validation comparisons.
        on_steps: called after each evaluation with the steps of all heads so far; one that ended counts as having taken all.
        on_halves: called with a sentence each time that memory runs out; by default it warns.
    """
    if len(members) == 1:
        return [_fit_alone(members[0], train, val, on_steps)]
    assert isinstance(train, PreferenceData) and isinstance(val, PreferenceData)  # noqa: S101, PT018 - see `plan_stacks`

    def relay(event: StackProgress) -> None:
        if on_steps:
            on_steps(event.heads * event.step + (len(members) - event.heads) * event.steps)

    try:
        return [*fit_stack(members, train, val, on_progress=relay)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()  # here the error is gone, and with it the frames that hold the stack's tensors
    on_halves(f"Not all heads of a kind fit the memory of {train.device} at once; smaller groups are trained.")
    half, steps = len(members) // 2, Course.of(members[0].config, len(train)).steps

    def relay_second(taken: int) -> None:
        if on_steps:
            on_steps(half * steps + taken)

    first = fit_members(members[:half], train, val, on_steps=on_steps, on_halves=on_halves)
    return first + fit_members(members[half:], train, val, on_steps=relay_second, on_halves=on_halves)


def _fit_alone(
    member: Member,
    train: TrainingData,
    val: TrainingData,
    on_steps: Callable[[int], None] | None,
) -> FitResult | PalcacheError:
    def relay(event: FitProgress) -> None:
        if on_steps:
            on_steps(event.row.step)

    try:
        return fit(member.shape, train, val, member.config, on_progress=relay)
    except NumericsError as error:
        return error
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
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
