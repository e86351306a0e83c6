"""`fit`: train the projectors and user weights of a head on cached vectors; the encoder never runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import torch

from palcache.checkpoints import FitState, HistoryRow
from palcache.configs import FitConfig
from palcache.errors import InputError, NumericsError
from palcache.heads import PalB, Parameters
from palcache.heads.pal_b import scale
from palcache.losses import cross_entropy
from palcache.tensors import PreferenceData

__all__ = ["FitProgress", "FitResult", "FitState", "HistoryRow", "epoch_order", "fit", "validate"]

SHUFFLE_ROWS: Final = 1_024
SHUFFLE_BLOCKS: Final = 64
"""Streamed data is read in shuffled blocks of 1,024 comparisons, mixed 64 blocks at a time."""
EVALUATION_ROWS: Final = 8_192
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
    shape: PalB,
    train: PreferenceData,
    val: PreferenceData,
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
        shape: the head.
        train: training comparisons; their users numbered as the head's.
        val: validation comparisons, never the test set; users likewise, -1 where the head does not know them.
        config: optimizer, schedule, stopping and seed.
        on_progress: called after each evaluation.
        on_state: called after each evaluation with all that is needed to go on.
        state: where to go on; None starts anew.

    Raises:
        InputError: a split is empty, or its vectors or users do not fit the head.
        NumericsError: the loss is not finite; the message says where it began.
    """
    _check(shape, train, val)
    start = time.perf_counter()
    run = _Run(shape, train, config, state)
    history = list(state.history) if state else []
    best = state.best if state else run.snapshot()
    stopped = _stalled(history, config)
    while run.step < run.steps and not stopped:
        begun, before = time.perf_counter(), run.epoch
        with _few_threads(run.work, train.device):
            loss = run.segment()
            rate = (run.epoch - before) * len(train) / (time.perf_counter() - begun)
            val_loss, val_accuracy = validate(shape, run.parameters, val)
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


def _check(shape: PalB, train: PreferenceData, val: PreferenceData) -> None:
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
    if int(train.user.min()) < 0:
        raise InputError(
            "A training comparison is of a user whom the head does not have; build the head for its users."
        )


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


@torch.no_grad()
def validate(shape: PalB, parameters: Mapping[str, torch.Tensor], data: PreferenceData) -> tuple[float, float]:
    """Return mean loss and accuracy; users whom the head does not know (-1) have the mean mixture."""
    known = shape.mixtures(parameters)
    mixtures = torch.cat([known, known.mean(0, keepdim=True)])
    loss = torch.zeros((), dtype=torch.float64, device=data.device if data.device.type != "mps" else "cpu")
    right = torch.zeros_like(loss)
    for batch in data.batches(EVALUATION_ROWS):
        margins = shape.margins(parameters, batch, mixtures=mixtures[batch.user])
        loss += cross_entropy(margins, batch.y).sum().to(loss)
        right += ((1 + margins.sign() * batch.y.sign()) / 2).sum().to(loss)
    return float(loss) / len(data), float(right) / len(data)


@final
class _Run:
    """The moving parts of one training: parameters, optimizer, order of the comparisons."""

    def __init__(self, shape: PalB, train: PreferenceData, config: FitConfig, state: FitState | None) -> None:
        self.shape, self.train, self.config = shape, train, config
        self.step = state.step if state else 0
        start = state.parameters if state else shape.initial(torch.Generator().manual_seed(config.seed))
        self.parameters = {name: value.to(train.device).requires_grad_() for name, value in _copy(start).items()}
        self.steps_per_epoch = -(-len(train) // config.batch_size)
        self.steps = self.steps_per_epoch * config.total_epochs(len(train))
        self.optimizer = _optimizer(self.parameters, config, train.device)
        self._peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._noise = torch.Generator(train.device)
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
        return float(scale(self.parameters).detach())

    @property
    def work(self) -> int:
        """Multiply-adds of a step's forward pass, at most: two responses and k prompts of every comparison."""
        n = min(self.config.batch_size, len(self.train))
        f, g = (sum(v.numel() for name, v in self.parameters.items() if name.startswith(part)) for part in ("f.", "g."))
        return n * (2 * f + g)

    def snapshot(self) -> Parameters:
        return _copy(self.parameters)

    def segment(self) -> float:
        """Train up to the next evaluation; return the mean loss of the steps."""
        number = self.step * self.config.evaluations // self.steps + 1
        last = -(-number * self.steps // self.config.evaluations)
        self._noise.manual_seed(_seed_of(self.config.seed, 1, self.step))
        first, losses = self.step, []
        for rows in self._batches(last):
            losses.append(self._update(rows))
        values = torch.stack(losses)
        if not bool(torch.isfinite(values).all()):
            bad = int(torch.nonzero(~torch.isfinite(values))[0])
            step = first + bad
            raise NumericsError(
                f"The loss is {float(values[bad])} at step {step + 1} (epoch {step // self.steps_per_epoch + 1}, batch "
                f"{step % self.steps_per_epoch + 1}) with learning rate {self._schedule(step) * self._peaks[0]:.2e}; "
                "lower --lr."
            )
        return float(values.mean())

    def _update(self, rows: torch.Tensor) -> torch.Tensor:
        factor = self._schedule(self.step)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        batch = self.train.batch(rows)
        loss = cross_entropy(self.shape.margins(self.parameters, batch, noise=self._noise), batch.y).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _schedule(self, step: int) -> float:
        """Return the factor on the peak learning rates: linear warmup, then half a cosine down to 0."""
        warm = self.config.warmup * self.steps
        rising = min(1.0, (step + 1) / max(1.0, warm))
        return rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def _batches(self, last: int) -> Iterator[torch.Tensor]:
        """Yield the rows of each step up to `last`; the order depends on the seed and the epoch alone."""
        while self.step < last:
            epoch, skip = divmod(self.step, self.steps_per_epoch)
            order = epoch_order(len(self.train), _seed_of(self.config.seed, 0, epoch), streamed=self.train.streamed)
            batches = order.to(self.train.device).tensor_split(self.steps_per_epoch)
            yield from batches[skip : skip + last - self.step]

    def moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{moment}": value.detach().clone()
            for name, parameter in self.parameters.items()
            for moment, value in self.optimizer.state[parameter].items()
        }

    def _restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            parameter = self.parameters[name]
            where = "cpu" if value.dim() == 0 and parameter.device.type == "cpu" else parameter.device
            self.optimizer.state[parameter][moment] = value.to(where).clone()


def _copy(parameters: Mapping[str, torch.Tensor]) -> Parameters:
    return {name: value.detach().clone() for name, value in parameters.items()}


def _optimizer(parameters: Parameters, config: FitConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW with the learning rates and weight decay of each group of parameters."""
    rates = {"user.logits": config.lr_users, "logit_scale": config.lr_scale}
    projectors = [value for name, value in parameters.items() if name not in rates]
    groups: list[dict[str, Any]] = [{"params": projectors, "lr": config.lr, "weight_decay": config.weight_decay}]
    groups += [{"params": [parameters[name]], "lr": lr, "weight_decay": 0.0} for name, lr in rates.items()]
    return torch.optim.AdamW(groups, fused=device.type in {"cpu", "cuda"})


def _seed_of(seed: int, stream: int, counter: int) -> int:
    """Return a seed for one use of randomness: streams and counters never share one."""
    return ((seed * 2 + stream) << 24) + counter


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
