"""What people see: tables and progress on a terminal, plain lines elsewhere. Data to stdout, talk to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from palcache.evaluation import Evaluation

LINE_SECONDS = 5.0


class Progress(Protocol):
    """Shows how far a long job is."""

    def update(self, done: float, total: float, text: str) -> None:
        """Show `done` of `total` and a text with rates."""


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """Print talk on stderr."""
    typer.echo(text, err=True)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Show a progress bar with ETA on a terminal, and a line now and then elsewhere."""
    if not sys.stderr.isatty():
        lines = _Lines(title)
        yield lines
        lines.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(title, total=None, text=""))


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, done: float, total: float, text: str) -> None:
        self._bar.update(self._task, completed=done, total=total, text=text)


class _Lines:
    def __init__(self, title: str) -> None:
        self._title, self._next, self._last = title, time.monotonic() + 1.0, ""

    def update(self, done: float, total: float, text: str) -> None:
        share = done / total if total else 1.0
        self._last = f"{self._title}: {share:4.0%}  {text}"
        if time.monotonic() >= self._next:
            self.finish()
            self._next = time.monotonic() + LINE_SECONDS

    def finish(self) -> None:
        if self._last:
            say(self._last)
            self._last = ""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is text, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, 118) if not console.is_terminal else console.width).print(table)


EVALUATION_COLUMNS = ("", "accuracy", "95 % interval", "macro", "worst tenth", "log-loss", "Brier", "ECE")


def evaluation_rows(evaluations: Mapping[str, Evaluation], names: Mapping[str, str]) -> list[list[str]]:
    """Return a row per rule: accuracy with its interval, macro, worst tenth and calibration."""
    rows = []
    for rule, evaluation in evaluations.items():
        micro = evaluation.accuracy["micro"]
        calibration = (evaluation.log_loss, evaluation.brier, evaluation.calibration_error)
        rows.append(
            [
                names.get(rule, rule),
                f"{micro.value:.4f}",
                f"{micro.low:.3f} to {micro.high:.3f}",
                f"{evaluation.accuracy['macro'].value:.4f}",
                f"{evaluation.accuracy['worst_tenth'].value:.4f}",
                *("-" if value is None else f"{value:.4f}" for value in calibration),
            ]
        )
    return rows


def describe(evaluation: Evaluation, split: str) -> str:
    """Return what an evaluation was made on."""
    ties = f", {evaluation.ties} ties counting one half" if evaluation.ties else ", no ties"
    return f"{split}: {evaluation.n:,} comparisons of {evaluation.users:,} users{ties}; intervals resample users"
