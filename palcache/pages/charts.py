"""Charts of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palcache.checkpoints import HistoryRow
from palcache.pages.chart_parts import (
    COLOURS,
    HEIGHT,
    RULES,
    Spec,
    chart,
    field,
    group_colours,
    levels_of,
    number,
    scale_of,
)
from palcache.pages.run_views import Row, Simplex
from palcache.runs.prototypes import Matrix


def losses(history: Sequence[HistoryRow], best_step: int) -> Spec:
    """Return training and validation loss by step, the chosen step marked."""
    rows = [
        {"step": row.step, "loss": value, "of": of, "epoch": row.epoch, "lr": row.lr}
        for row in history
        for of, value in (("training", row.train_loss), ("validation", row.val_loss))
    ]
    colour = scale_of(("training", "validation"), ("var(--longer)", "var(--head)"), "of")
    tooltip = [field("of", "loss of", "nominal"), number("loss", "nats", ".4f"), number("step", "step", ",d"),
               number("epoch", "epoch", ".2f"), number("lr", "learning rate", ".2~e")]  # fmt: skip
    y = field("loss", "loss (nats per comparison)", scale={"zero": False})
    line = {
        "mark": {"type": "line", "point": True},
        "encoding": {"x": _step(), "y": y, "color": colour, "tooltip": tooltip},
    }
    return chart("Training and validation loss by step", HEIGHT, _chosen(best_step), {"data": {"values": rows}, **line})


def validation(history: Sequence[HistoryRow], best_step: int) -> Spec:
    """Return validation accuracy by step, the chosen step marked."""
    rows = [{"step": row.step, "accuracy": row.val_accuracy, "epoch": row.epoch} for row in history]
    tooltip = [number("accuracy", "accuracy", ".4f"), number("step", "step", ",d"), number("epoch", "epoch", ".2f")]
    y = field("accuracy", "accuracy on validation", scale={"zero": False})
    line = {"mark": {"type": "line", "point": True}, "encoding": {"x": _step(), "y": y, "tooltip": tooltip}}
    return chart("Validation accuracy by step", HEIGHT, _chosen(best_step), {"data": {"values": rows}, **line})


def _step() -> Spec:
    return field("step", "step", axis={"grid": False, "tickCount": 6, "format": ",d"})


def _chosen(step: int) -> Spec:
    mark = {"type": "rule", "strokeDash": [4, 3], "color": "var(--ink)", "strokeWidth": 1}
    tooltip = [number("step", "chosen step", ",d")]
    return {"data": {"values": [{"step": step}]}, "mark": mark, "encoding": {"x": _step(), "tooltip": tooltip}}


def user_accuracies(users: Sequence[Row]) -> Spec:
    """Return each user's accuracy by the head and by the user-blind yardstick, from the lowest to the highest."""
    rows = [
        {"rank": i + 1, "user": row["user"], "group": row["group"] or "-", "n": row["n"], "accuracy": row[rule],
         "rule": name, "head": row["head"], "blind": row["user_blind"]}
        for i, row in enumerate(users)
        for rule, name in (("user_blind", RULES["user_blind"]), ("head", RULES["head"]))
    ]  # fmt: skip
    x = field("rank", "users, by the head's accuracy", axis={"grid": False, "labels": False, "ticks": False},
              scale={"domain": [0, len(users) + 1], "nice": False})  # fmt: skip
    y = field("accuracy", "accuracy on test", scale={"domain": [0, 1]}, axis={"format": ".0%"})
    tooltip = [field("user", "user", "nominal"), field("group", "group", "nominal"), number("head", "head"),
               number("blind", "user-blind"), number("n", "comparisons", ",d")]  # fmt: skip
    names = (RULES["head"], RULES["user_blind"])
    size = 46 if len(users) <= 150 else 20
    dots = {
        "mark": {"type": "point", "size": size},
        "encoding": {"x": x, "y": y, "tooltip": tooltip, "color": scale_of(names, [COLOURS[n] for n in names], "rule")},
    }
    between = {
        "transform": [{"filter": "datum.rule === 'head'"}],
        "mark": {"type": "rule", "color": "var(--line)", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": field("head", None), "y2": {"field": "blind"}},
    }
    layers = (between, dots) if len(users) <= 150 else (dots,)
    return chart("Accuracy of each user on test", HEIGHT, *layers, data={"values": rows})


def simplex(found: Simplex) -> Spec:
    """Return users among the prototypes, coloured by group."""
    groups = sorted({row["group"] for row in found.users if row["group"]})
    names = [*groups, *(["not known"] if any(not row["group"] for row in found.users) else [])]
    colours = [*group_colours(len(groups)), "var(--longer)"]
    tooltip = [
        field("user", "user", "nominal"),
        field("group", "group", "nominal"),
        field("mixture", "weights", "nominal"),
    ]
    dots: Spec = {
        "data": {"values": [{**row, "group": row["group"] or "not known"} for row in found.users]},
        "mark": {"type": "point", "opacity": 0.85, "size": 52, "stroke": "var(--paper)"},
        "encoding": {"x": _place(found, "x"), "y": _place(found, "y"), "tooltip": tooltip},
    }
    if groups:
        dots["encoding"]["color"] = scale_of(names, colours, "group")
    if found.form == "line":
        tallest = max((row["y"] for row in found.users), default=0)
        return chart("Users between the two prototypes", min(300, 90 + int(9 * tallest)), dots)
    spec = chart("Users among the prototypes", 320, *_corners(found), dots)
    return {**spec, "width": 340, "autosize": "pad"}


def _corners(found: Simplex) -> list[Spec]:
    """Return the prototypes as diamonds, and the sides of a triangle."""
    x, y = _place(found, "x"), _place(found, "y")
    triangle = found.form == "triangle"
    diamond = {"type": "point", "shape": "diamond", "filled": False, "color": "var(--ink)", "size": 170}
    name = {"type": "text", "dy": {"expr": "datum.y > 0.4 ? -16 : 18" if triangle else "-16"}, "fontSize": 11}
    corners: Spec = {
        "data": {"values": [{**row, "number": row["name"].split()[-1]} for row in found.corners]},
        "encoding": {"x": x, "y": y},
        "layer": [
            {"mark": diamond, "encoding": {"tooltip": [field("name", "corner", "nominal")]}},
            {"mark": name, "encoding": {"text": {"field": "name" if triangle else "number"}}},
        ],
    }
    if not triangle:
        return [corners]
    outline = [*found.corners, found.corners[0]]
    sides = {
        "data": {"values": [{**row, "order": i} for i, row in enumerate(outline)]},
        "mark": {"type": "line", "color": "var(--line)", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": y, "order": field("order", None)},
    }
    return [sides, corners]


def _place(found: Simplex, name: str) -> Spec:
    """Return a position: weights on a line, equal units in both directions otherwise."""
    if found.form == "line":
        if name == "x":
            return field(
                "x", "weight of prototype 2 (0 is all prototype 1)", scale={"domain": [0, 1]}, axis={"tickCount": 5}
            )
        tallest = max(8.0, *(row["y"] for row in found.users), 0.0)
        return field("y", None, axis=None, scale={"domain": [-0.5, tallest + 1]})
    values = [row[axis] for row in (*found.users, *found.corners) for axis in ("x", "y")]
    low = {axis: min(row[axis] for row in (*found.users, *found.corners)) for axis in ("x", "y")}
    high = {axis: max(row[axis] for row in (*found.users, *found.corners)) for axis in ("x", "y")}
    reach = 0.58 * max(high["x"] - low["x"], (high["y"] - low["y"]) * 340 / 320) if values else 1.0
    middle = (low[name] + high[name]) / 2
    half = reach if name == "x" else reach * 320 / 340
    return field(name, None, axis=None, scale={"domain": [middle - half, middle + half], "nice": False})


def similarity(matrix: Matrix, title: str, *, signed: bool) -> Spec:
    """Return a k x k matrix as a grid of squares: the stronger the colour, the further from the middle."""
    rows = [
        {"one": f"{i + 1}", "other": f"{j + 1}", "value": value, "size": abs(value) if signed else abs(2 * value - 1),
         "sign": value >= (0.0 if signed else 0.5)}
        for i, line in enumerate(matrix)
        for j, value in enumerate(line)
    ]  # fmt: skip
    axis = {"domain": False, "ticks": False, "labelAngle": 0, "labelPadding": 6}
    x, y = field("other", "prototype", "ordinal", axis=axis), field("one", "prototype", "ordinal", axis=axis)
    tooltip = [field("one", "prototype", "ordinal"), field("other", "and prototype", "ordinal"), number("value", title)]
    colour = {"field": "sign", "type": "nominal", "legend": None,
              "scale": {"domain": [True, False], "range": ["var(--head)", "var(--blind)"]}}  # fmt: skip
    strength = field("size", None, scale={"domain": [0, 1], "range": [0.06, 0.75]}, legend=None)
    cells = {"mark": {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 2},
             "encoding": {"color": colour, "fillOpacity": strength, "tooltip": tooltip}}  # fmt: skip
    size = 34 if len(matrix) > 4 else 52
    text = {"mark": {"type": "text", "fontSize": 11 if len(matrix) > 4 else 13},
            "encoding": {"text": number("value", title, ".2f"), "tooltip": tooltip}}  # fmt: skip
    return {"description": title, "data": {"values": rows}, "width": {"step": size}, "height": {"step": size},
            "encoding": {"x": x, "y": y}, "layer": [cells, text]}  # fmt: skip


def reliability(rows: Sequence[Row]) -> Spec:
    """Return predicted against observed shares of response 2, over bins of equal mass."""
    values = [{**row, "rule": RULES[row["rule"]]} for row in rows]
    share: Spec = {"scale": {"domain": [0, 1]}, "axis": {"format": ".0%", "tickCount": 5}}
    names = [RULES["head"], RULES["user_blind"]]
    tooltip = [field("rule", "rule", "nominal"), number("predicted", "predicted"), number("observed", "observed"),
               number("n", "comparisons", ",d")]  # fmt: skip
    diagonal = {
        "data": {"values": [{"predicted": 0, "observed": 0}, {"predicted": 1, "observed": 1}]},
        "mark": {"type": "line", "color": "var(--muted)", "strokeDash": [4, 3], "strokeWidth": 1},
    }
    lines = {
        "data": {"values": values},
        "mark": {"type": "line", "point": True},
        "encoding": {"color": scale_of(names, [COLOURS[name] for name in names], "rule"), "tooltip": tooltip},
    }
    encoding = {
        "x": field("predicted", "predicted P(response 2)", **share),
        "y": field("observed", "observed share", **share),
    }
    return chart("Reliability: predicted against observed shares", 280, diagonal, lines, encoding=encoding)


def margins(rows: Sequence[Row]) -> Spec:
    """Return the histogram of the head's margins towards the answer."""
    values = [{**row, "side": "right" if row["right"] else "wrong"} for row in rows]
    x = field("low", "margin towards the user's answer", bin={"binned": True}, axis={"grid": False, "tickCount": 7})
    tooltip = [number("low", "from", ".3~g"), number("high", "to", ".3~g"), number("n", "comparisons", ",d")]
    colour = scale_of(("right", "wrong"), ("var(--head)", "var(--wrong)"), "side")
    bars = {"mark": {"type": "bar", "binSpacing": 1}, "encoding": {
        "x": x, "x2": {"field": "high"}, "y": field("n", "comparisons"), "color": colour, "tooltip": tooltip}}  # fmt: skip
    return chart("Margins towards the user's answer", HEIGHT, bars, data={"values": values})


def curve_rows(curve: Mapping[str, Any]) -> list[Row]:
    """Return the points of a learning curve as `palcache adapt` wrote it."""
    out = []
    for shots, point in sorted(curve["curve"].items(), key=lambda item: int(item[0])):
        low, high = (point["accuracy"]["interval"] or {}).get("micro") or (None, None)
        out.append({"shots": int(shots), "accuracy": point["accuracy"]["micro"], "low": low, "high": high,
                    "users": point["users"]})  # fmt: skip
    return out


def learning_curve(curve: Mapping[str, Any]) -> Spec:
    """Return the accuracy of new users by their number of comparisons, beside seen users and yardsticks."""
    rows = curve_rows(curve)
    beside = {"seen users": curve["seen"]} | {RULES[name]: found for name, found in curve["yardsticks"].items()}
    levels = [{"of": name, "accuracy": found["accuracy"]["micro"]} for name, found in beside.items()]
    x = field("shots", "comparisons per new user", "ordinal", axis={"grid": False, "labelAngle": 0})
    y = field("accuracy", "accuracy on their other comparisons", scale={"zero": False}, axis={"format": ".0%"})
    tooltip = [number("shots", "comparisons", ",d"), number("accuracy", "accuracy"), number("low", "from"),
               number("high", "to"), number("users", "users", ",d")]  # fmt: skip
    band = {"data": {"values": rows}, "mark": {"type": "area", "color": "var(--head)", "opacity": 0.15},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}}  # fmt: skip
    line = {
        "data": {"values": rows},
        "mark": {"type": "line", "point": True},
        "encoding": {"x": x, "y": y, "tooltip": tooltip},
    }
    return chart("Accuracy of new users by number of comparisons", 280, band, levels_of(levels, y), line)
