"""Tables and pictures from frozen results."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from palcache.errors import PalcacheError
from palcache.files import write_bytes, write_with
from palcache.training import HistoryRow


def draw_history(path: Path, history: Sequence[HistoryRow], *, best_step: int, title: str = "") -> None:
    """Replace `path` by a PNG of the training curves: losses and scale, validation accuracy, the chosen step.

    The same history gives the same bytes on one machine.

    Raises:
        PalcacheError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PalcacheError(
            "The picture of the curves needs matplotlib; install it: pip install matplotlib."
        ) from error

    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
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
