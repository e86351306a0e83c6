"""The sections of a page about several runs side by side."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from palcache.choices import RULE_NAMES
from palcache.contrasts import ContrastRow, Contrasts, metric_of
from palcache.errors import CacheError
from palcache.pages import sweep_charts
from palcache.pages.chart_parts import RULES
from palcache.pages.contrast_tables import HEADINGS, behind_cells, option_text, remarks, row_options, spread_text
from palcache.pages.markup import Html, element, paragraph, section, table
from palcache.pages.page_figures import ChartBook, optional
from palcache.pages.run_views import Row, read_history
from palcache.runs.records import REPLICATES, Options, RunRecord

ACROSS = ("k", "p", "lr", "head", "loss", "score", "projector", "mixture")
"""The option that stands at the bottom of a chart is the first of these that differs, else the first that does."""


def sweep_sections(records: Sequence[RunRecord], contrasts: Contrasts, book: ChartBook) -> Html:
    """Return everything that a page says about runs side by side."""
    across = next((name for name in (*ACROSS, *contrasts.by) if name in contrasts.by), None)
    found = [_compared(contrasts)]
    grid = []
    if across is not None:
        grid.append(_by_option(across, records, contrasts, book))
    grid.append(_curves(across, records, book))
    found.append(section("At a glance", element("div", "".join(grid), class_="grid")))
    found.append(_all_runs(records, contrasts))
    return "".join(found)


def _compared(contrasts: Contrasts) -> Html:
    columns = ["", *contrasts.by, "runs", *HEADINGS.values(), "behind the first", "p"]
    rows = [
        [RULE_NAMES[row.rule] + (" (best)" if row.best else ""), *row_options(row, contrasts.by), str(row.runs),
         *(spread_text(row.metrics.get(name), "±") for name in HEADINGS), *behind_cells(row)]
        for row in contrasts.rows
    ]  # fmt: skip
    best = [at for at, row in enumerate(contrasts.rows) if row.best]
    tall = len(rows) > 40
    content = table(columns, rows, texts=1 + len(contrasts.by), best=best, sortable=tall)
    return section(
        "Comparison", content, paragraph(" ".join(remarks(contrasts)).replace("+-", "±")), lead=f"On {contrasts.split}."
    )


def _by_option(across: str, records: Sequence[RunRecord], contrasts: Contrasts, book: ChartBook) -> Html:
    heads = [row for row in contrasts.rows if row.rule == "head"]
    values = list(dict.fromkeys(option_text(row.options[across]) for row in heads))
    means = [
        _chosen([row for row in heads if option_text(row.options[across]) == value], records, across)
        for value in values
    ]
    runs: list[Row] = []
    for value in values:
        members = [record for record in records if option_text(record.options[across]) == value]
        runs += [
            {"option": value, "run": record.path.name, "offset": 0.5 * (i / max(1, len(members) - 1) - 0.5),
             "accuracy": record.evaluations["test"]["head"].accuracy["micro"].value}
            for i, record in enumerate(members)
        ]  # fmt: skip
    levels = [
        {"of": RULES[row.rule], "accuracy": row.metrics["micro"].mean}
        for row in contrasts.rows
        if row.rule != "head" and len([other for other in contrasts.rows if other.rule == row.rule]) == 1
    ]
    several = any(row["runs"] > 1 for row in means)
    what = "one standard deviation over runs" if several else "the 95 % interval over users"
    caption = (
        f"Large dots: for each {across} the setting of the lowest validation loss, with {what}. Small dots: all runs."
    )
    rows = [[row["option"], f"{row['accuracy']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}", str(row["runs"]),
             row["setting"] or "-"] for row in means]  # fmt: skip
    folded = table((across, "accuracy", "interval", "runs", "setting"), rows)
    spec = sweep_charts.by_option(across, runs, means, levels)
    return book.add("by-option", spec, f"Accuracy on test by {across}", caption, fallback=folded)


def _chosen(rows: Sequence[ContrastRow], records: Sequence[RunRecord], across: str) -> Row:
    """Return the row of the lowest mean validation loss as a point with its interval."""
    by_path = {record.path: record for record in records}

    def loss(row: ContrastRow) -> float:
        found = [by_path[path].evaluations["val"]["head"].log_loss or 0.0 for path in row.paths]
        return sum(found) / len(found)

    best = min(rows, key=loss)
    spread = best.metrics["micro"]
    if spread.deviation is None:
        estimate = by_path[best.paths[0]].evaluations["test"]["head"].accuracy["micro"]
        low, high = estimate.low, estimate.high
        low, high = (low, high) if low == low else (spread.mean, spread.mean)  # noqa: PLR0124 - NaN of a single user
    else:
        low, high = spread.mean - spread.deviation, spread.mean + spread.deviation
    setting = _setting(best.options, across)
    value = option_text(best.options[across])
    return {"option": value, "accuracy": spread.mean, "low": low, "high": high, "runs": best.runs, "setting": setting}


def _setting(options: Options, without: str | None = None) -> str:
    return ", ".join(f"{name} = {option_text(value)}" for name, value in options.items() if name != without)


def _curves(across: str | None, records: Sequence[RunRecord], book: ChartBook) -> Html:
    rows, chosen = [], []
    for record in records:
        value = option_text(record.options[across]) if across else "all"
        points: list[Row] = [
            {"run": record.path.name, "epoch": round(row.epoch, 3), "loss": round(row.val_loss, 5), "value": value}
            for row in read_history(record.path / "history.csv")
        ]
        rows += points
        chosen.append(min(points, key=lambda point: point["loss"]))
    caption = f"One line per run{f', coloured by {across}' if across else ''}; a dot where it is lowest."
    return book.add("all-curves", sweep_charts.all_curves(rows, chosen, across or ""), "Validation loss", caption)


def new_users_section(path: Path, book: ChartBook) -> Html:
    """Return the curve of new users over the heads of a sweep, from the `new_users.csv` of its folder; empty without one.

    Raises:
        CacheError: the file is damaged.
    """
    if not path.is_file():
        return ""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = [_new_users_point(line) for line in csv.DictReader(lines)]
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(
            f"{path} is damaged ({type(error).__name__}: {error}); run palcache sweep with --new-comparisons again."
        ) from error
    cells = [
        [str(row["shots"]), f"{row['accuracy']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}", str(row["heads"])]
        for row in rows
    ]
    folded = table(("comparisons per user", "accuracy", "interval", "heads"), cells)
    caption = "Mean over the heads of the sweep on which users can be adapted, with one standard deviation over heads."
    place = book.add("new-users", sweep_charts.new_users(rows), "New users over all heads", caption, fallback=folded)
    return section("New users", element("div", place, class_="grid"))


def _new_users_point(line: Mapping[str, str]) -> Row:
    mean, deviation = float(line["accuracy_mean"]), float(line["accuracy_sd"])
    return {"shots": int(line["shots"]), "accuracy": mean, "low": mean - deviation, "high": mean + deviation,
            "heads": int(line["heads"])}  # fmt: skip


def _all_runs(records: Sequence[RunRecord], contrasts: Contrasts) -> Html:
    seeds = [name for name in REPLICATES if len({record.options.get(name) for record in records}) > 1]
    options = dict.fromkeys((*contrasts.by, *(seeds or ["seed"])))
    columns = ["run", *options, "val log-loss", "val accuracy", *(f"test {name}" for name in HEADINGS.values())]
    rows = []
    for record in records:
        val, test = record.evaluations["val"]["head"], record.evaluations["test"]["head"]
        rows.append(
            [record.path.name, *(option_text(record.options.get(name)) for name in options), optional(val.log_loss),
             f"{val.accuracy['micro'].value:.4f}", *(optional(metric_of(test, name)) for name in HEADINGS)]
        )  # fmt: skip
    note = "A click on a heading sorts."
    return section("All runs", table(columns, rows, texts=1 + len(contrasts.by), sortable=True), lead=note)
