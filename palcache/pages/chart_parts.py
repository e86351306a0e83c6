"""What charts share: Vega-Lite specifications as plain JSON values, and what each colour means.

A colour means one thing everywhere: the head, the user-blind yardstick, the longer response, a population group. Colours are
names of the page's style sheet, so that light, dark and print need no other chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from palcache.choices import RULE_NAMES

Spec = dict[str, Any]
RULES: Final[Mapping[str, str]] = {rule: name.partition(" (")[0] for rule, name in RULE_NAMES.items()}
"""Their names without what stands in brackets."""
COLOURS: Final[Mapping[str, str]] = {
    "head": "var(--head)",
    "user-blind": "var(--blind)",
    "longer response": "var(--longer)",
    "seen users": "var(--ink)",
}
GROUPS: Final = 8
"""Colours for groups; the style sheet names them --group-1 to --group-8."""
HEIGHT: Final = 240
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CONFIG: Final[Spec] = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "domainColor": "var(--line)", "gridColor": "var(--line)", "tickColor": "var(--line)", "labelColor": "var(--muted)",
        "titleColor": "var(--muted)", "titleFontWeight": "normal", "titleFontSize": 12, "labelFontSize": 11,
        "titlePadding": 8, "labelPadding": 4, "tickSize": 4, "gridOpacity": 0.7, "domain": False,
    },
    "legend": {
        "orient": "top", "title": None, "titleColor": "var(--muted)", "titleFontWeight": "normal",
        "labelColor": "var(--ink)", "labelFontSize": 12, "symbolStrokeWidth": 2,
        "columnPadding": 14, "offset": 6, "columns": 3,
    },
    "text": {"color": "var(--ink)", "fontSize": 12},
    "rule": {"color": "var(--muted)"},
    "line": {"strokeWidth": 2, "color": "var(--head)"},
    "point": {"filled": True, "size": 42, "color": "var(--head)", "opacity": 1},
    "bar": {"color": "var(--head)"},
}  # fmt: skip


def field(name: str, title: str | None, kind: str = "quantitative", **more: Any) -> Spec:
    """Return a channel that shows a field."""
    return {"field": name, "type": kind, "title": title, **more}


def number(name: str, title: str, form: str = ".3f") -> Spec:
    """Return a number of a tooltip."""
    return field(name, title, format=form)


def scale_of(names: Sequence[str], colours: Sequence[str], name: str) -> Spec:
    """Return a colour by a field's values."""
    return field(name, None, "nominal", scale={"domain": list(names), "range": list(colours)})


def levels_of(levels: Sequence[Spec], y: Spec) -> Spec:
    """Return a dashed line at the accuracy of each yardstick: `of` and `accuracy` of each."""
    names = [level["of"] for level in levels]
    return {
        "data": {"values": list(levels)},
        "mark": {"type": "rule", "strokeWidth": 1.5, "strokeDash": [5, 3]},
        "encoding": {
            "y": y,
            "color": scale_of(names, [COLOURS[name] for name in names], "of"),
            "tooltip": [field("of", "rule", "nominal"), number("accuracy", "accuracy")],
        },
    }


def chart(description: str, height: int, *layers: Spec, **more: Any) -> Spec:
    """Return a chart as wide as its place."""
    size = {"width": "container", "height": height, "autosize": {"type": "fit", "contains": "padding"}}
    return {"description": description, **size, "layer": list(layers), **more}


def group_colours(n: int) -> list[str]:
    """Return n colours; beyond `GROUPS` they repeat."""
    return [f"var(--group-{i % GROUPS + 1})" for i in range(n)]
