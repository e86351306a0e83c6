"""What the sections of a page share: charts that are gathered while sections are written, key figures, numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, final

from palcache.evaluation import Evaluation
from palcache.metrics import Estimate
from palcache.pages.chart_parts import Spec
from palcache.pages.markup import Html, element, figure, text


@final
@dataclass(frozen=True, slots=True)
class ChartBook:
    """The charts of a page by name, gathered while its sections are written."""

    specs: dict[str, Spec] = field(default_factory=dict)

    def add(self, name: str, spec: Spec, title: str, caption: str = "", **more: Any) -> Html:
        """Keep a chart and return its place; `more` goes to `palcache.pages.markup.figure`."""
        self.specs[name] = spec
        return figure(name, title, caption, **more)


def key_figures(values: Iterable[tuple[str, str, str]]) -> Html:
    """Return large numbers side by side: name, number, and a small remark."""
    cells = (
        element("div", element("dt", text(name)) + element("dd", text(number) + element("small", text(remark))))
        for name, number, remark in values
    )
    return element("dl", "".join(cells), class_="figures")


def interval(estimate: Estimate) -> str:
    """Return a 95 % interval of a share in words; empty where there is none."""
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f} %" if math.isfinite(estimate.low) else ""


def _bounds(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}" if math.isfinite(estimate.low) else "-"


def share(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.1f} %"


def optional(value: float | None) -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def evaluation_cells(evaluation: Evaluation) -> list[str]:
    """Return accuracy, interval, macro, worst tenth, log-loss, Brier score and ECE as text."""
    accuracy = evaluation.accuracy
    scores = (evaluation.log_loss, evaluation.brier, evaluation.calibration_error)
    return [
        f"{accuracy['micro'].value:.4f}", _bounds(accuracy["micro"]), f"{accuracy['macro'].value:.4f}",
        f"{accuracy['worst_tenth'].value:.4f}", *map(optional, scores),
    ]  # fmt: skip
