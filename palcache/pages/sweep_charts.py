"""Charts of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from palcache.pages.chart_parts import Spec, chart, field, group_colours, levels_of, number, scale_of
from palcache.pages.run_views import Row


def by_option(name: str, runs: Sequence[Row], means: Sequence[Row], levels: Sequence[Row]) -> Spec:
    """Return accuracy by an option: every run, the mean of the chosen setting with its interval, and yardsticks.

    Args:
        name: of the option.
        runs: `option`, `accuracy`, `run` of each.
        means: `option`, `accuracy`, `low`, `high`, `runs`, `setting` of each value.
        levels: `of`, `accuracy` of each yardstick.
    """
    order = list(dict.fromkeys(row["option"] for row in means))
    x = field("option", name, "ordinal", sort=order, axis={"grid": False, "labelAngle": 0, "labelLimit": 140})
    y = field("accuracy", "accuracy on test", scale={"zero": False}, axis={"format": ".0%"})
    every = {
        "data": {"values": list(runs)},
        "mark": {"type": "point", "size": 26, "opacity": 0.3},
        "encoding": {"x": x, "y": y, "xOffset": field("offset", None, scale={"domain": [-1, 1]}),
                     "tooltip": [field("run", "run", "nominal"), number("accuracy", "accuracy", ".4f")]},
    }  # fmt: skip
    tooltip = [field("option", name, "nominal"), number("accuracy", "mean accuracy", ".4f"), number("low", "from", ".4f"),
               number("high", "to", ".4f"), number("runs", "runs", ",d"), field("setting", "setting", "nominal")]  # fmt: skip
    spread = {"data": {"values": list(means)}, "mark": {"type": "rule", "strokeWidth": 2, "color": "var(--head)"},
              "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "tooltip": tooltip}}  # fmt: skip
    dots = {"data": {"values": list(means)}, "mark": {"type": "point", "size": 80},
            "encoding": {"x": x, "y": y, "tooltip": tooltip}}  # fmt: skip
    return chart(f"Accuracy on test by {name}", 280, levels_of(levels, y), every, spread, dots)


def new_users(rows: Sequence[Row]) -> Spec:
    """Return the accuracy of new users by their number of comparisons: the mean over heads and a standard deviation.

    Args:
        rows: `shots`, `accuracy`, `low`, `high`, `heads` of each number.
    """
    x = field("shots", "comparisons per new user", "ordinal", axis={"grid": False, "labelAngle": 0})
    y = field("accuracy", "accuracy on their other comparisons", scale={"zero": False}, axis={"format": ".0%"})
    tooltip = [number("shots", "comparisons", ",d"), number("accuracy", "mean accuracy", ".4f"), number("low", "from", ".4f"),
               number("high", "to", ".4f"), number("heads", "heads", ",d")]  # fmt: skip
    data = {"values": list(rows)}
    spread = {"data": data, "mark": {"type": "rule", "strokeWidth": 2, "color": "var(--head)"},
              "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "tooltip": tooltip}}  # fmt: skip
    line = {"data": data, "mark": {"type": "line", "point": True}, "encoding": {"x": x, "y": y, "tooltip": tooltip}}
    return chart("Accuracy of new users by number of comparisons, over the heads of the sweep", 280, spread, line)


def all_curves(rows: Sequence[Row], chosen: Sequence[Row], name: str) -> Spec:
    """Return the validation loss of many runs by epoch, and a dot where each is lowest.

    Args:
        rows: `run`, `epoch`, `loss` and `value`, that of the option which colours runs.
        chosen: the same, of each run's lowest loss.
        name: of the option.
    """
    values = list(dict.fromkeys(row["value"] for row in rows))
    colour = {**scale_of(values, group_colours(len(values)), "value"), "legend": {"title": name} if name else None}
    faint = max(0.25, min(0.9, 4 / math.sqrt(len(chosen))))
    encoding = {
        "x": field("epoch", "epoch", axis={"grid": False, "tickCount": 6}),
        "y": field("loss", "validation loss (nats)", scale={"zero": False}),
        "color": colour,
    }
    lines = {
        "data": {"values": list(rows)},
        "mark": {"type": "line", "strokeWidth": 1.2, "opacity": faint},
        "encoding": {"detail": {"field": "run"}},
    }
    tooltip = [
        field("run", "run", "nominal"),
        number("loss", "lowest loss", ".4f"),
        number("epoch", "at epoch", ".2f"),
    ]
    dots = {
        "data": {"values": list(chosen)},
        "mark": {"type": "point", "size": 24},
        "encoding": {"tooltip": tooltip},
    }
    return chart("Validation loss of all runs by epoch", 280, lines, dots, encoding=encoding)
