"""What people see: tables and progress on a terminal, plain lines elsewhere. Data to stdout, talk to stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from palcache.evaluation import Evaluation
    from palcache.metrics import Estimate

LINE_SECONDS = 5.0
UNLIMITED = 10_000
"""Columns of a table that is written to a file or a pipe."""


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
        self._start: float | None = None

    def update(self, done: float, total: float, text: str) -> None:
        self._start = self._start or time.monotonic()
        share = done / total if total else 1.0
        left = (time.monotonic() - self._start) * (1 - share) / share if share else math.inf
        eta = f"  eta {left:,.0f} s" if 0 < left < math.inf else ""
        self._last = f"{self._title}: {share:4.0%}  {text}{eta}"
        if time.monotonic() >= self._next:
            self.finish()
            self._next = time.monotonic() + LINE_SECONDS

    def finish(self) -> None:
        if self._last:
            say(self._last)
            self._last = ""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> None:
    """Print a table on stdout and cut nothing: where a terminal is too narrow, each row becomes a block of lines.

    Args:
        title: printed above the table.
        columns: their names.
        rows: their cells.
        text: the first so many columns are text, the others numbers.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", soft_wrap=True)
    needed = Measurement.get(console, console.options.update(width=UNLIMITED), table).maximum
    if console.is_terminal and needed > console.width:
        label = max(map(len, columns))
        for row in rows:
            lines = (f"  {column:<{label}}  {cell}" for column, cell in zip(columns, row, strict=True))
            console.print("\n".join(lines), end="\n\n", soft_wrap=True)
        return
    console.width = needed
    console.print(table, end="\n\n")


def print_evaluations(title: str, evaluations: Mapping[str, Evaluation], names: Mapping[str, str]) -> None:
    """Print a column per rule: accuracy with its interval, macro, worst tenth, and calibration (ECE: expected error)."""
    columns = [_figures(evaluation) for evaluation in evaluations.values()]
    rows = [[figure, *(column.get(figure, "-") for column in columns)] for figure in columns[0]]
    print_table(title, ["", *(names.get(rule, rule) for rule in evaluations)], rows)


def describe_interval(estimate: Estimate) -> str:
    """Return an interval for people; a dash where there is none."""
    return f"{estimate.low:.3f} to {estimate.high:.3f}" if math.isfinite(estimate.low) else "-"


def _figures(evaluation: Evaluation) -> dict[str, str]:
    micro = evaluation.accuracy["micro"]
    calibration = {
        "log-loss": evaluation.log_loss,
        "Brier": evaluation.brier,
        "ECE": evaluation.calibration_error,
    }
    return {
        "accuracy": f"{micro.value:.4f}",
        "95 % interval": describe_interval(micro),
        "macro": f"{evaluation.accuracy['macro'].value:.4f}",
        "worst tenth": f"{evaluation.accuracy['worst_tenth'].value:.4f}",
        **({} if evaluation.token_accuracy is None else {"right tokens": f"{evaluation.token_accuracy:.4f}"}),
        **{name: "-" if value is None else f"{value:.4f}" for name, value in calibration.items()},
    }


def describe(evaluation: Evaluation, split: str) -> str:
    """Return what an evaluation was made on."""
    ties = f", {evaluation.ties} ties counting one half" if evaluation.ties else ", no ties"
    return f"{split}: {evaluation.n:,} comparisons of {evaluation.users:,} users{ties}; intervals resample users"
