"""`fit`: train a head on cached vectors, pooled or of every token; the encoder never runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import final

import torch

from palcache.checkpoints import FitState, HistoryRow
from palcache.configs import FitConfig
from palcache.errors import NumericsError
from palcache.fits import (
    WORK_PER_THREAD,
    Course,
    FitProgress,
    FitResult,
    check_fit,
    few_threads,
    mean_loss,
    multiply_adds,
    require_finite,
    require_finite_losses,
    require_vectors,
    stalled,
)
from palcache.heads import Head, Parameters, SolvedHead, scale
from palcache.heads.protocols import trained_names
from palcache.noises import Noise, noise_keys
from palcache.objectives import Objective, TrainingData
from palcache.optimizers import StackedOptimizer, rate_factor
from palcache.orders import epoch_order, in_windows, kept_at_hand, order_seed
from palcache.tensors import PairBatch, PreferenceData
from palcache.token_batches import TokenBatch, TokenData

__all__ = [
    "FitProgress",
    "FitResult",
    "FitState",
    "HistoryRow",
    "epoch_order",
    "fit",
    "order_seed",
    "require_vectors",
    "validate",
]


def fit(
    shape: Head,
    train: TrainingData,
    val: TrainingData,
    config: FitConfig,
    *,
    on_progress: Callable[[FitProgress], None] | None = None,
    on_state: Callable[[FitState], None] | None = None,
    state: FitState | None = None,
) -> FitResult:
    """Train a head and return the parameters of the lowest validation loss.

    The same arguments give the same result on the same machine, whether or not training was interrupted and continued
    from a state. On a CPU a small head is trained on few threads (`WORK_PER_THREAD`).

    Args:
        shape: the head; one that is solved at once takes no steps.
        train: training comparisons, pooled or of every token; their users numbered as the head's.
        val: validation comparisons, never the test set; users likewise, -1 where the head does not know them.
        config: optimizer, schedule, stopping and seed.
        on_progress: called after each evaluation.
        on_state: called after each evaluation with all that is needed to go on.
        state: where to go on; None starts anew.

    Raises:
        InputError: a split is empty, or its vectors or users do not fit the head or the loss.
        NumericsError: the loss is not finite; the message says where it began.
    """
    check_fit(shape, train, val, config)
    start = time.perf_counter()
    if isinstance(shape, SolvedHead) and isinstance(train, PreferenceData) and isinstance(val, PreferenceData):
        return _solve(shape, train, val, config, on_progress)
    objective, val = Objective(shape, config), kept_at_hand(val)
    run = _Run(objective, train, state)
    history = list(state.history) if state else []
    best = state.best if state else run.snapshot()
    stopped = stalled(history, config)
    while run.step < run.course.steps and not stopped:
        begun, before = time.perf_counter(), run.epoch
        with few_threads(run.work, train.device):
            loss = run.segment()
            rate = (run.epoch - before) * len(train) / (time.perf_counter() - begun)
            val_loss, val_accuracy = objective.validate(run.parameters, val)
        row = HistoryRow(run.step, run.epoch, loss, val_loss, val_accuracy, run.lr, run.scale)
        require_finite(val_loss, row, run.course)
        if val_loss < min((r.val_loss for r in history), default=math.inf):
            best = run.snapshot()
        history.append(row)
        stopped = stalled(history, config)
        if on_state:
            on_state(FitState(run.step, run.snapshot(), best, run.optimizer.state(0), tuple(history)))
        if on_progress:
            on_progress(FitProgress(row, run.course.steps, rate))
    best_step = min(history, key=lambda r: r.val_loss).step
    return FitResult(best, tuple(history), best_step, stopped, time.perf_counter() - start)


def _solve(
    shape: SolvedHead,
    train: PreferenceData,
    val: PreferenceData,
    config: FitConfig,
    on_progress: Callable[[FitProgress], None] | None,
) -> FitResult:
    """Solve a head and report it as one step."""
    start, objective = time.perf_counter(), Objective(shape, config)
    zero = shape.initial(torch.Generator())
    for name, data in (("training", train), ("validation", val)):
        if not math.isfinite(objective.validate({k: v.to(data.device) for k, v in zero.items()}, data)[0]):
            raise NumericsError(f"The {name} vectors are not finite; run palcache cache verify on the cache.")
    parameters = shape.solve(train, val)
    (loss, _), (val_loss, accuracy) = objective.validate(parameters, train), objective.validate(parameters, val)
    row = HistoryRow(1, 1.0, loss, val_loss, accuracy, 0.0, 1.0)
    require_finite(val_loss, row, Course(1, 1, 1))
    seconds = time.perf_counter() - start
    if on_progress:
        on_progress(FitProgress(row, 1, len(train) / seconds))
    return FitResult(parameters, (row,), 1, stopped_early=False, seconds=seconds)


def validate(shape: Head, parameters: Mapping[str, torch.Tensor], data: PreferenceData) -> tuple[float, float]:
    """Return mean loss and accuracy; users whom the head does not know (-1) have the mean mixture."""
    return Objective(shape, FitConfig()).validate(parameters, data)


@final
class _Run:
    """The moving parts of one training: parameters, optimizer, order of the comparisons."""

    def __init__(self, objective: Objective, train: TrainingData, state: FitState | None) -> None:
        self.objective, self.train, self.config = objective, train, objective.config
        shape, config = objective.shape, objective.config
        self.step = state.step if state else 0
        start = state.parameters if state else shape.initial(torch.Generator().manual_seed(config.seed))
        self.parameters = {name: value.to(train.device) for name, value in _copy(start).items()}
        self.trained = trained_names(shape, self.parameters)
        for name in self.trained:
            self.parameters[name].requires_grad_()
        self.course = Course.of(config, len(train))
        one = {name: self.parameters[name].detach().unsqueeze(0) for name in self.trained}
        self.optimizer = StackedOptimizer(one, [config], self.course.steps)
        self.counts = torch.bincount(train.user, minlength=shape.users) if config.weighting == "users" else None
        if state:
            self.optimizer.restore(state.moments, state.step)

    @property
    def epoch(self) -> float:
        return self.step / self.course.steps_per_epoch

    @property
    def lr(self) -> float:
        return self.config.lr * rate_factor(self.config, self.step - 1, self.course.steps)

    @property
    def scale(self) -> float:
        return float(scale(self.parameters).detach()) if "logit_scale" in self.parameters else 1.0

    @property
    def work(self) -> int:
        """Multiply-adds of a step's forward pass."""
        if isinstance(self.train, TokenData):  # every token is projected: enough for all threads
            return torch.get_num_threads() * WORK_PER_THREAD
        return multiply_adds(self.parameters, min(self.config.batch_size, len(self.train)))

    def snapshot(self) -> Parameters:
        return _copy(self.parameters)

    def segment(self) -> float:
        """Train up to the next evaluation; return the mean loss of the steps."""
        last = self.course.next_evaluation(self.step)
        first, losses = self.step, []
        keys = noise_keys(self.config.seed, range(first, last)).to(self.train.device)
        for (data, rows), key in zip(self._batches(last), keys.unbind(), strict=True):
            losses.append(self._update(data.batch(rows), Noise(key)))
        values = torch.stack(losses)
        require_finite_losses(values, self.config, first, self.course)
        return mean_loss(values)

    def _update(self, batch: PairBatch | TokenBatch, noise: Noise) -> torch.Tensor:
        updates = Parameters()
        loss = self.objective(self.parameters, batch, noise=noise, updates=updates, counts=self.counts)
        trained = [self.parameters[name] for name in self.trained]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        gradients = {name: None if g is None else g.unsqueeze(0) for name, g in zip(self.trained, found, strict=True)}
        self.optimizer.step(gradients)
        self.parameters.update(updates)
        self.step += 1
        return loss.detach()

    def _batches(self, last: int) -> Iterator[tuple[TrainingData, torch.Tensor]]:
        """Yield the rows of each step up to `last`, and the data to take them from.

        The order depends on the seed and the epoch alone. Steps are counted as their batches are trained on.
        """
        while self.step < last:
            epoch, skip = divmod(self.step, self.course.steps_per_epoch)
            order = epoch_order(len(self.train), order_seed(self.config.seed, epoch), window=self.train.window)
            batches = order.to(self.train.device).tensor_split(self.course.steps_per_epoch)
            before = sum(len(rows) for rows in batches[:skip])
            yield from in_windows(self.train, batches[skip : skip + last - self.step], before=before)


def _copy(parameters: Mapping[str, torch.Tensor]) -> Parameters:
    return {name: value.detach().clone() for name, value in parameters.items()}
