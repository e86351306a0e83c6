"""`fit`: train a head on cached vectors, pooled or of every token; the encoder never runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, final

import torch

from palcache.checkpoints import FitState, HistoryRow
from palcache.choices import EMBED_JOINT, EMBED_TOKENS
from palcache.configs import FitConfig
from palcache.errors import InputError, NumericsError
from palcache.heads import Head, IdealPointHead, Parameters, SolvedHead, scale
from palcache.heads.protocols import group_of, trained_names
from palcache.noises import Noise, noise_keys
from palcache.objectives import Objective, TrainingData
from palcache.optimizers import build_optimizer, rate_factor
from palcache.tensors import PreferenceData
from palcache.token_batches import TokenData

__all__ = ["FitProgress", "FitResult", "FitState", "HistoryRow", "epoch_order", "fit", "validate"]

SHUFFLE_ROWS: Final = 1_024
SHUFFLE_BLOCKS: Final = 64
"""Streamed data is read in shuffled blocks of 1,024 comparisons, mixed 64 blocks at a time."""
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
    _check(shape, train, val, config)
    start = time.perf_counter()
    if isinstance(shape, SolvedHead) and isinstance(train, PreferenceData) and isinstance(val, PreferenceData):
        return _solve(shape, train, val, config, on_progress)
    objective = Objective(shape, config)
    run = _Run(objective, train, state)
    history = list(state.history) if state else []
    best = state.best if state else run.snapshot()
    stopped = _stalled(history, config)
    while run.step < run.steps and not stopped:
        begun, before = time.perf_counter(), run.epoch
        with _few_threads(run.work, train.device):
            loss = run.segment()
            rate = (run.epoch - before) * len(train) / (time.perf_counter() - begun)
            val_loss, val_accuracy = objective.validate(run.parameters, val)
        row = HistoryRow(run.step, run.epoch, loss, val_loss, val_accuracy, run.lr, run.scale)
        _require_finite(val_loss, row)
        if val_loss < min((r.val_loss for r in history), default=math.inf):
            best = run.snapshot()
        history.append(row)
        stopped = _stalled(history, config)
        if on_state:
            on_state(FitState(run.step, run.snapshot(), best, run.moments(), tuple(history)))
        if on_progress:
            on_progress(FitProgress(row, run.steps, rate))
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
    _require_finite(val_loss, row)
    seconds = time.perf_counter() - start
    if on_progress:
        on_progress(FitProgress(row, 1, len(train) / seconds))
    return FitResult(parameters, (row,), 1, stopped_early=False, seconds=seconds)


def _check(shape: Head, train: TrainingData, val: TrainingData, config: FitConfig) -> None:
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
        require_vectors(shape, config, joint=data.joint, tokens=isinstance(data, TokenData))
    if int(train.user.min()) < 0:
        raise InputError(
            "A training comparison is of a user whom the head does not have; build the head for its users."
        )


def require_vectors(shape: Head, config: FitConfig, *, joint: bool, tokens: bool) -> None:
    """Refuse a head or a loss that needs other vectors than there are, naming the command that makes them.

    Args:
        shape: the head.
        config: how it is to be trained.
        joint: the vectors are of prompt and response in one forward.
        tokens: there is a vector at every token.

    Raises:
        InputError: they do not fit.
    """
    if shape.joint and not joint:
        raise InputError(
            "PAL-A reads vectors of prompt and response in one forward, and these are of each alone; make them with "
            f"{EMBED_JOINT}."
        )
    weighting = config.token_weighting
    if weighting is not None and not tokens:
        raise InputError(
            f"The token loss {weighting} needs a vector at every token, and the cache is pooled; make them with "
            f"{EMBED_TOKENS}, or leave out --token-weighting."
        )
    if weighting is None and tokens:
        raise InputError("The vectors are of every token; choose --token-weighting mean, cumulative or only_last.")
    if not isinstance(shape, IdealPointHead) and (tokens or config.bound_weight):
        what = "token losses" if tokens else "the bound of ideal points"
        raise InputError(f"Only pal-a and pal-b have {what}; choose one of them with --head.")


def _stalled(history: list[HistoryRow], config: FitConfig) -> bool:
    if not config.patience or not history:
        return False
    best = min(range(len(history)), key=lambda i: history[i].val_loss)
    return len(history) - 1 - best >= config.patience


def _require_finite(val_loss: float, row: HistoryRow) -> None:
    if not math.isfinite(val_loss):
        raise NumericsError(
            f"The validation loss is {val_loss} at step {row.step} (epoch {row.epoch:.2f}) with learning rate {row.lr:.2e}; "
            "lower --lr."
        )


@contextmanager
def _few_threads(work: int, device: torch.device) -> Iterator[None]:
    """Use no more CPU threads than a step's multiply-adds keep busy."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, min(before, work // WORK_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self.steps_per_epoch = -(-len(train) // config.batch_size)
        self.steps = self.steps_per_epoch * config.total_epochs(len(train))
        trained = {name: self.parameters[name] for name in self.trained}
        self.optimizer = build_optimizer(trained, config, train.device)
        self.counts = torch.bincount(train.user, minlength=shape.users) if config.weighting == "users" else None
        self._peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        if state:
            self._restore(state.moments)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def scale(self) -> float:
        return float(scale(self.parameters).detach()) if "logit_scale" in self.parameters else 1.0

    @property
    def work(self) -> int:
        """Multiply-adds of a step's forward pass, at most: two responses and k prompts of every comparison."""
        if isinstance(self.train, TokenData):  # every token is projected: enough for all threads
            return torch.get_num_threads() * WORK_PER_THREAD
        n = min(self.config.batch_size, len(self.train))
        sizes = {name: value.numel() for name, value in self.parameters.items() if group_of(name) == "projectors"}
        prompts = sum(size for name, size in sizes.items() if name.startswith("g."))
        return n * (2 * (sum(sizes.values()) - prompts) + prompts)

    def snapshot(self) -> Parameters:
        return _copy(self.parameters)

    def segment(self) -> float:
        """Train up to the next evaluation; return the mean loss of the steps."""
        number = self.step * self.config.evaluations // self.steps + 1
        last = -(-number * self.steps // self.config.evaluations)
        first, losses = self.step, []
        keys = noise_keys(self.config.seed, range(first, last)).to(self.train.device)
        for rows, key in zip(self._batches(last), keys.unbind(), strict=True):
            losses.append(self._update(rows, Noise(key)))
        values = torch.stack(losses)
        if not bool(torch.isfinite(values).all()):
            bad = int(torch.nonzero(~torch.isfinite(values))[0])
            step = first + bad
            rate = rate_factor(self.config, step, self.steps) * self._peaks[0]
            raise NumericsError(
                f"The loss is {float(values[bad])} at step {step + 1} (epoch {step // self.steps_per_epoch + 1}, batch "
                f"{step % self.steps_per_epoch + 1}) with learning rate {rate:.2e}; lower --lr."
            )
        return float(values.mean())

    def _update(self, rows: torch.Tensor, noise: Noise) -> torch.Tensor:
        factor = rate_factor(self.config, self.step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        batch, updates = self.train.batch(rows), Parameters()
        loss = self.objective(self.parameters, batch, noise=noise, updates=updates, counts=self.counts)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.parameters.update(updates)
        self.step += 1
        return loss.detach()

    def _batches(self, last: int) -> Iterator[torch.Tensor]:
        """Yield the rows of each step up to `last`; the order depends on the seed and the epoch alone."""
        while self.step < last:
            epoch, skip = divmod(self.step, self.steps_per_epoch)
            order = epoch_order(len(self.train), order_seed(self.config.seed, epoch), streamed=self.train.streamed)
            batches = order.to(self.train.device).tensor_split(self.steps_per_epoch)
            yield from batches[skip : skip + last - self.step]

    def moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{moment}": value.detach().clone()
            for name in self.trained
            for moment, value in self.optimizer.state[self.parameters[name]].items()
        }

    def _restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            parameter = self.parameters[name]
            where = "cpu" if value.dim() == 0 and parameter.device.type == "cpu" else parameter.device
            self.optimizer.state[parameter][moment] = value.to(where).clone()


def _copy(parameters: Mapping[str, torch.Tensor]) -> Parameters:
    return {name: value.detach().clone() for name, value in parameters.items()}


def order_seed(seed: int, epoch: int) -> int:
    """Return the seed of the order of an epoch: seeds and epochs never share one."""
    return (seed << 25) + epoch


def epoch_order(n: int, seed: int, *, streamed: bool = False) -> torch.Tensor:
    """Return a permutation of n comparisons, (n,) int64.

    Resident data is permuted freely. Streamed data is permuted in blocks of `SHUFFLE_ROWS` neighbours and then freely
    within every `SHUFFLE_BLOCKS` blocks, so that reading it stays nearly sequential.
    """
    generator = torch.Generator().manual_seed(seed)
    if not streamed:
        return torch.randperm(n, generator=generator)
    blocks = torch.split(torch.arange(n), SHUFFLE_ROWS)
    shuffled = [blocks[i] for i in torch.randperm(len(blocks), generator=generator).tolist()]
    parts = [torch.cat(shuffled[at : at + SHUFFLE_BLOCKS]) for at in range(0, len(shuffled), SHUFFLE_BLOCKS)]
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])
