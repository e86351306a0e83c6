"""Training, told to TensorBoard or Weights & Biases as it happens: an event per evaluation, and what came out at the end.

A log takes `FitProgress` events, so it stands wherever `on_progress` does. It is written under `RUN/logs/` with wall times in
it, and is no part of the run: the other files are the same with and without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol, final, get_args

from palcache.checkpoints import HistoryRow
from palcache.errors import InputError, PalcacheError
from palcache.runs.folders import LOGS, RunResult
from palcache.training import FitProgress

LogKind = Literal["tensorboard", "wandb"]
CURVES: Final = ("train_loss", "val_loss", "val_accuracy", "lr", "scale")
Values = Mapping[str, float]


class EventLog(Protocol):
    """Takes the events of a training."""

    def __call__(self, event: FitProgress) -> None:
        """Log an evaluation."""

    def finish(self, options: Mapping[str, Any], metrics: Values) -> None:
        """Log what was trained and what came out, and close the log."""


def open_logs(kinds: Sequence[str], run: Path) -> tuple[EventLog, ...]:
    """Return a log of each kind for a run; nothing is written before its first event.

    Args:
        kinds: which.
        run: the run folder.

    Raises:
        InputError: a kind is unknown.
        PalcacheError: the package that a kind needs is not installed.
    """
    made: dict[str, type[TensorBoardLog | WandbLog]] = {"tensorboard": TensorBoardLog, "wandb": WandbLog}
    for kind in kinds:
        if kind not in made:
            raise InputError(f"Got the log {kind!r}; expected one of {', '.join(get_args(LogKind))}.")
    return tuple(made[kind](run) for kind in dict.fromkeys(kinds))


def log_run(kinds: Sequence[str], result: RunResult) -> None:
    """Log a finished run as `open_logs` and `finish_logs` would have while it was trained, the yardstick's curve left out.

    Raises:
        InputError: a kind is unknown.
        PalcacheError: the package that a kind needs is not installed.
    """
    if result.fitted is None:
        return
    logs, history = open_logs(kinds, result.path), result.fitted.history
    for row in history:
        for log in logs:
            log(FitProgress(row, history[-1].step, 0.0))
    finish_logs(logs, result)


def finish_logs(logs: Sequence[EventLog], result: RunResult) -> None:
    """Close logs with a run's options and final metrics; a run that was complete before leaves no log."""
    if result.fitted is None:
        return
    about = result.head.about
    for log in logs:
        log.finish({**about["head"], **about["fit"], "table": about["table"]["name"]}, final_metrics(result))


def final_metrics(result: RunResult) -> dict[str, float]:
    """Return a run's numbers by name: `test/head/accuracy`, `val/user_blind/log_loss`, ..."""
    out: dict[str, float] = {}
    for split, rules in result.evaluations.items():
        for rule, found in rules.items():
            scores = {"log_loss": found.log_loss, "calibration_error": found.calibration_error}
            accuracies = {"accuracy" if name == "micro" else name: e.value for name, e in found.accuracy.items()}
            out |= {
                f"{split}/{rule}/{name}": value for name, value in (accuracies | scores).items() if value is not None
            }
    return out


def _curves(rule: str, row: HistoryRow) -> dict[str, float]:
    return {f"{rule}/{name}": float(getattr(row, name)) for name in CURVES}


def _missing(kind: LogKind, error: ImportError) -> PalcacheError:
    return PalcacheError(f"The log {kind} needs a package ({error}); install it: pip install 'palcache[{kind}]'.")


@final
class TensorBoardLog:
    """Event files in `RUN/logs/tensorboard`, which `tensorboard --logdir` finds under any folder above.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self._make, self._folder = SummaryWriter, run / LOGS / "tensorboard"
        self._writer: Any = None

    def __call__(self, event: FitProgress) -> None:
        """Log an evaluation."""
        for name, value in _curves(event.rule, event.row).items():
            self._opened().add_scalar(name, value, event.row.step)

    def finish(self, options: Mapping[str, Any], metrics: Values) -> None:
        """Log options and metrics as hparams, and close the files."""
        plain = {
            name: value if isinstance(value, bool | int | float) else str(value) for name, value in options.items()
        }
        self._opened().add_hparams(plain, dict(metrics), run_name=".")
        self._writer.close()

    def _opened(self) -> Any:
        if self._writer is None:
            self._writer = self._make(log_dir=str(self._folder))
        return self._writer


@final
class WandbLog:
    """A run of the project `palcache` in `RUN/logs/wandb`: offline unless WANDB_MODE says otherwise; `wandb sync` sends it.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from error
        self._wandb, self._run = wandb, run
        self._log: Any = None

    def __call__(self, event: FitProgress) -> None:
        """Log an evaluation."""
        curves = _curves(event.rule, event.row)
        self._opened().log({**curves, f"{event.rule}/step": event.row.step})

    def finish(self, options: Mapping[str, Any], metrics: Values) -> None:
        """Log options as the run's configuration and metrics as its summary, and close it."""
        log = self._opened()
        log.config.update(dict(options))
        log.summary.update(dict(metrics))
        log.finish()

    def _opened(self) -> Any:
        if self._log is None:
            folder = self._run / LOGS
            folder.mkdir(parents=True, exist_ok=True)
            self._log = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "palcache"),
                name=self._run.resolve().name,
                dir=folder,
                mode=os.environ.get("WANDB_MODE", "offline"),
                settings=self._wandb.Settings(silent=True, console="off", disable_git=True),
            )
            for rule in ("head", "user_blind"):  # the yardstick's steps begin anew
                self._log.define_metric(f"{rule}/step")
                self._log.define_metric(f"{rule}/*", step_metric=f"{rule}/step")
        return self._log
