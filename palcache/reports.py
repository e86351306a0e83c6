"""Tables and pictures from frozen results."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from palcache.errors import PalcacheError
from palcache.evaluation import Evaluation
from palcache.files import write_bytes, write_with
from palcache.training import HistoryRow
from palcache.users.curves import CurvePoint


def draw_history(path: Path, history: Sequence[HistoryRow], *, best_step: int, title: str = "") -> None:
    """Replace `path` by a PNG of the training curves: losses and scale, validation accuracy, the chosen step.

    The same history gives the same bytes on one machine.

    Raises:
        PalcacheError: matplotlib is not installed.
    """
    figure = _figure(9, 3.4)
    losses, accuracy = figure.subplots(1, 2)
    steps = [row.step for row in history]
    losses.plot(steps, [row.train_loss for row in history], marker="o", markersize=3, color="#8a8f98", label="training")
    losses.plot(steps, [row.val_loss for row in history], marker="o", markersize=3, color="#1f5fbf", label="validation")
    losses.set(xlabel="step", ylabel="loss (nats per comparison)")
    accuracy.plot(
        steps, [row.val_accuracy for row in history], marker="o", markersize=3, color="#1f5fbf", label="validation"
    )
    accuracy.set(xlabel="step", ylabel="accuracy")
    for axes in (losses, accuracy):
        axes.axvline(best_step, color="#c2410c", linewidth=1, linestyle="--", label=f"chosen: step {best_step}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def write_history(path: Path, history: Sequence[HistoryRow]) -> None:
    """Replace `path` by a CSV table with one line per evaluation; the same history gives the same bytes."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [field.name for field in fields(HistoryRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in history)
    write_bytes(path, buffer.getvalue().encode())


def draw_curve(
    path: Path,
    points: Sequence[CurvePoint],
    *,
    seen: Evaluation,
    yardsticks: Mapping[str, Evaluation],
    title: str = "",
) -> None:
    """Replace `path` by a PNG of a learning curve of new users with its 95 % intervals, beside seen users and yardsticks.

    Raises:
        PalcacheError: matplotlib is not installed.
    """
    figure = _figure(6.4, 4)
    axes = figure.subplots()
    at = range(len(points))  # shots grow about geometrically: evenly spaced
    micro = [point.evaluation.accuracy["micro"] for point in points]
    axes.fill_between(at, [e.low for e in micro], [e.high for e in micro], color="#1f5fbf", alpha=0.15, linewidth=0)
    axes.plot(at, [e.value for e in micro], marker="o", markersize=4, color="#1f5fbf", label="new users")
    lines = {"seen users": (seen, "#c2410c"), **{name: (e, "#8a8f98") for name, e in yardsticks.items()}}
    for i, (name, (evaluation, colour)) in enumerate(lines.items()):
        value = evaluation.accuracy["micro"].value
        axes.axhline(value, color=colour, linewidth=1, linestyle=("--", "-.", ":")[i % 3], label=name.replace("_", "-"))
    axes.set(xlabel="support comparisons per new user", ylabel="accuracy on the query", title=title)
    axes.set_xticks(list(at), [f"{p.shots}\n{p.evaluation.users:,} users" for p in points], fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=8)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def _figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches, drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PalcacheError("The picture of curves needs matplotlib; install it: pip install matplotlib.") from error

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
