"""`fit_stack`: train many heads of one shape at once, each as `fit` would train it alone.

Parameters stand on a leading axis, one `torch.func.vmap` of the head's own pure functions gives all losses, one backward
pass all gradients, and one optimizer all steps. What is a number and not a shape may differ from head to head.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, final

import torch
from torch.func import vmap

from palcache.checkpoints import HistoryRow
from palcache.configs import FitConfig
from palcache.errors import NumericsError
from palcache.fits import (
    Course,
    FitResult,
    check_fit,
    few_threads,
    mean_loss,
    multiply_adds,
    require_finite,
    require_finite_losses,
    stalled,
)
from palcache.heads import Head, Parameters, scale
from palcache.heads.protocols import trained_names
from palcache.noises import Dropout, Noise, noise_keys
from palcache.objectives import Objective
from palcache.optimizers import StackedOptimizer, rate_factor
from palcache.orders import kept_at_hand
from palcache.stacked_batches import StackedBatch, StackedOrder
from palcache.tensors import PairBatch, PreferenceData

EVALUATION_VALUES: Final = 1 << 24
"""Numbers in a stack's projections of one batch of validation comparisons."""
_DROPOUT: Final = re.compile(r"-dropout\d+")
FREE: Final[Mapping[str, Any]] = {
    "lr": 0.0, "lr_users": 0.0, "lr_scale": 0.0, "lr_prototypes": 0.0, "weight_decay": 0.0, "warmup": 0.0,
    "schedule": "constant", "patience": 0, "seed": 0, "bound": 0.0,
}  # fmt: skip
"""Options of training that may differ within a stack."""


@final
@dataclass(frozen=True, slots=True)
class Member:
    """A head to be trained.

    Attributes:
        shape: of the head.
        config: how it is trained.
    """

    shape: Head
    config: FitConfig

    def kind(self, comparisons: int) -> Hashable:
        """Return what members of one stack have in common, trained on so many comparisons.

        Free are the options in `FREE`, the temperature, the start, the rate of dropout, and weights of the bound above 0.
        """
        config = replace(
            self.config,
            **FREE,
            epochs=self.config.total_epochs(comparisons),
            bound_weight=float(self.config.bound_weight > 0),
        )
        named = {field.name for field in dataclasses.fields(self.shape)}  # type: ignore[arg-type]
        free: dict[str, Any] = {"temperature": 1.0, "start": "shared"}
        if "projector" in named:
            free["projector"] = _DROPOUT.sub("", self.shape.projector)  # type: ignore[attr-defined]
        values = {name: value for name, value in free.items() if name in named}
        shape: Head = replace(self.shape, **values)  # type: ignore[type-var]
        return shape, config


@final
@dataclass(frozen=True, slots=True)
class StackProgress:
    """What `fit_stack` reports after each evaluation.

    Attributes:
        step: steps so far.
        steps: in all.
        heads: still in training.
        ended: heads that ended at this evaluation: numbers in the order of the members.
    """

    step: int
    steps: int
    heads: int
    ended: tuple[int, ...]


def fit_stack(
    members: Sequence[Member],
    train: PreferenceData,
    val: PreferenceData,
    *,
    on_progress: Callable[[StackProgress], None] | None = None,
) -> list[FitResult | NumericsError]:
    """Train heads of one kind together; each result equals that of `fit` alone.

    On a CPU to the last bit where all widths are multiples of 16 and the library's batched products are its single ones, as
    MKL's are; else up to the rounding of float32, of which now and then one decides on which side of zero a ReLU's input falls.
    A head that stops early leaves the stack; one whose loss is not finite leaves it with the error that `fit` would raise,
    and the others go on. `FitResult.seconds` is the head's share of the wall time.

    Args:
        members: of one `Member.kind`, trained step by step; neighbours of equal learning rates are the fastest.
        train: training comparisons; their users numbered as the heads'.
        val: validation comparisons.
        on_progress: called after each evaluation.

    Raises:
        InputError: a split is empty, or its vectors or users do not fit the heads.
    """
    assert len({member.kind(len(train)) for member in members}) == 1  # noqa: S101 - whoever groups them sees to it
    for member in members:
        check_fit(member.shape, train, val, member.config)
    start, stack, val = time.perf_counter(), _Stack(members, train), kept_at_hand(val)
    results: dict[int, FitResult | NumericsError] = {}
    while stack.alive:
        with few_threads(stack.work, train.device):
            rows = stack.evaluate(val, stack.segment())
        before = len(results)
        for at, row in enumerate(rows):
            result = stack.note(at, row)
            if result is not None:
                results[stack.alive[at]] = result
        ended = tuple(results)[before:]
        stack.leave(set(ended))
        if on_progress:
            on_progress(StackProgress(stack.step, stack.course.steps, len(stack.alive), ended))
    share = (time.perf_counter() - start) / len(members)
    found = [results[i] for i in range(len(members))]
    return [replace(result, seconds=share) if isinstance(result, FitResult) else result for result in found]


@final
class _Stack:
    """The moving parts of a stack: parameters, optimizer, orders, and what was seen of each head."""

    def __init__(self, members: Sequence[Member], train: PreferenceData) -> None:
        self.members, self.train, self.step = list(members), train, 0
        self.alive = list(range(len(members)))
        first = members[0]
        self.course = Course.of(first.config, len(train))
        drawn = [m.shape.initial(torch.Generator().manual_seed(m.config.seed)) for m in members]
        self.trained = trained_names(first.shape, drawn[0])
        self.parameters = {name: torch.stack([one[name] for one in drawn]).to(train.device) for name in drawn[0]}
        self._require_gradients()
        trained = {name: self.parameters[name] for name in self.trained}
        self.optimizer = StackedOptimizer(trained, [m.config for m in members], self.course.steps)
        self.order = StackedOrder(train, [m.config.seed for m in members], self.course)
        weighted = first.config.weighting == "users"
        self.counts = torch.bincount(train.user, minlength=first.shape.users) if weighted else None
        self.numbers = _Numbers.of(members, train.device)
        self.best: list[Parameters] = [{} for _ in members]
        self.history: list[list[HistoryRow]] = [[] for _ in members]

    def _require_gradients(self) -> None:
        for name in self.trained:
            self.parameters[name].requires_grad_()

    @property
    def work(self) -> int:
        """Multiply-adds of a step's forward pass."""
        return multiply_adds(self.parameters, min(self.members[0].config.batch_size, len(self.train)))

    def segment(self) -> torch.Tensor:
        """Train up to the next evaluation; return the losses of the steps, (s, h)."""
        first, last = self.step, self.course.next_evaluation(self.step)
        keys = torch.stack([noise_keys(m.config.seed, range(first, last)) for m in self.members], dim=1)
        losses = [self._update(key) for key in keys.to(self.train.device).unbind()]
        return torch.stack(losses)

    def _update(self, key: torch.Tensor) -> torch.Tensor:
        batch = self.order.batch(self.step)

        def one(
            parameters: Parameters, numbers: Mapping[str, torch.Tensor], key: torch.Tensor, *values: torch.Tensor
        ) -> tuple[torch.Tensor, Parameters]:
            objective, dropout = self.numbers.objective(numbers)
            updates = Parameters()
            loss = objective(
                parameters, PairBatch(*values), noise=Noise(key, dropout), updates=updates, counts=self.counts
            )
            return loss, updates

        mapped = vmap(one, in_dims=(0, 0, 0, *batch.dims))
        losses, updates = mapped(self.parameters, self.numbers.values, key, *batch.values)
        trained = [self.parameters[name] for name in self.trained]
        gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
        self.optimizer.step(dict(zip(self.trained, gradients, strict=True)))
        self.parameters.update(updates)
        self.step += 1
        return losses.detach()

    @torch.no_grad()
    def evaluate(self, val: PreferenceData, losses: torch.Tensor) -> list[HistoryRow | NumericsError]:
        """Return what is known of each head after a segment of some losses, (s, h)."""
        parts: list[torch.Tensor] = []
        for batch in val.batches(self._evaluation_rows()):
            shared = StackedBatch.shared(batch)

            def one(
                parameters: Parameters, numbers: Mapping[str, torch.Tensor], *values: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor]:
                return self.numbers.objective(numbers)[0].evaluate(parameters, PairBatch(*values))

            mapped = vmap(one, in_dims=(0, 0, *shared.dims))
            parts.append(torch.stack(mapped(self.parameters, self.numbers.values, *shared.values)).float())
        val_loss, accuracy = ([mean_loss(row) for row in rows] for rows in torch.cat(parts, dim=2).cpu())
        scales = scale(self.parameters).tolist() if "logit_scale" in self.parameters else [1.0] * len(self.alive)
        first, columns = self.step - len(losses), losses.T.contiguous().cpu()
        means = [mean_loss(column) for column in columns]
        rows: list[HistoryRow | NumericsError] = []
        for at, member in enumerate(self.members):
            factor = rate_factor(member.config, self.step - 1, self.course.steps)
            epoch, lr = self.step / self.course.steps_per_epoch, member.config.lr * factor
            row = HistoryRow(self.step, epoch, means[at], val_loss[at], accuracy[at], lr, scales[at])
            try:
                require_finite_losses(columns[at], member.config, first, self.course)
                require_finite(val_loss[at], row, self.course)
            except NumericsError as error:
                rows.append(error)
            else:
                rows.append(row)
        return rows

    def _evaluation_rows(self) -> int:
        shape = self.members[0].shape
        width = max(getattr(shape, "p", 1), 1) * (shape.k + 2)
        return max(64, min(8_192, EVALUATION_VALUES // (width * len(self.alive))))

    def note(self, at: int, row: HistoryRow | NumericsError) -> FitResult | NumericsError | None:
        """Keep what was seen of a head; return its result once it has ended."""
        if isinstance(row, NumericsError):
            return row
        history = self.history[at]
        if row.val_loss < min((r.val_loss for r in history), default=math.inf):
            self.best[at] = {name: value[at].detach().clone() for name, value in self.parameters.items()}
        history.append(row)
        stopped = stalled(history, self.members[at].config)
        if not stopped and self.step < self.course.steps:
            return None
        best_step = min(history, key=lambda r: r.val_loss).step
        return FitResult(self.best[at], tuple(history), best_step, stopped, 0.0)

    def leave(self, ended: set[int]) -> None:
        """Go on without some of the members."""
        kept = [at for at, number in enumerate(self.alive) if number not in ended]
        if len(kept) == len(self.alive):
            return
        for name in ("members", "alive", "best", "history"):
            setattr(self, name, [getattr(self, name)[at] for at in kept])
        if not kept:
            return
        heads = torch.tensor(kept, device=self.train.device)
        self.parameters = {name: value.detach()[heads] for name, value in self.parameters.items()}
        self._require_gradients()
        self.optimizer.take(heads, {name: self.parameters[name] for name in self.trained})
        self.order.take(kept)
        self.numbers = _Numbers.of(self.members, self.train.device)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Numbers:
    """The options that are numbers and differ between the heads of a stack.

    Attributes:
        values: (h,) each; empty where all heads have the same.
        member: a head whose shape and options stand for the rest.
    """

    values: Mapping[str, torch.Tensor]
    member: Member

    @classmethod
    def of(cls, members: Sequence[Member], device: torch.device) -> _Numbers:
        """Return those of some members."""
        values: dict[str, torch.Tensor] = {}
        rates = [float(getattr(getattr(m.shape, "items", None), "dropout", 0.0)) for m in members]
        if len(set(rates)) > 1:
            dropout = Dropout.stacked(rates, device)
            values |= {"threshold": cast(torch.Tensor, dropout.threshold), "dropout_scale": dropout.scale}
        columns = {
            "temperature": [float(getattr(m.shape, "temperature", 1.0)) for m in members],
            "bound": [m.config.bound for m in members],
            "bound_weight": [m.config.bound_weight for m in members],
        }
        for name, column in columns.items():
            if len(set(column)) > 1:
                values[name] = torch.tensor(column, dtype=torch.float32, device=device)
        return cls(values, members[0])

    def objective(self, values: Mapping[str, torch.Tensor]) -> tuple[Objective, Dropout | None]:
        """Return the objective and the rate of dropout of one head, its own numbers given, () each."""
        shape, config, bound = self.member.shape, self.member.config, None
        if "temperature" in values:  # a tensor where the shape has a number: both divide weights
            shape = replace(shape, temperature=values["temperature"])  # type: ignore[type-var]
        if "bound" in values or "bound_weight" in values:
            one = torch.ones(())
            weight, most = (
                values.get("bound_weight", one * config.bound_weight),
                values.get("bound", one * config.bound),
            )
            bound = (weight, most)
        dropout = Dropout(values["threshold"], values["dropout_scale"]) if "threshold" in values else None
        return Objective(shape, config, bound), dropout
