"""`palcache compare`: runs side by side, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palcache.errors import InputError

from .display import print_json, print_table, say
from .failures import reports_errors
from .options import JsonOption

if TYPE_CHECKING:
    from palcache.contrasts import ContrastRow, Contrasts, Spread


@reports_errors
def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, sweep folders, or folders of runs.", show_default=False)
    ],
    *,
    by: Annotated[
        str | None,
        typer.Option(help="Options to group by, for example k,lr.  [default: all that differ]", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="Which comparisons: test or val.")] = "test",
    draws: Annotated[int, typer.Option(help="Draws of the bootstrap over users.")] = 10_000,
    level: Annotated[float, typer.Option(help="Below which a corrected p-value supports a difference.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX table (booktabs) on stdout.")] = False,
    json_: JsonOption = False,
) -> None:
    """Compare runs: mean and standard deviation over seeds, the best marked only where a paired test supports it."""
    from palcache.contrasts import compare_runs
    from palcache.pages.contrast_tables import contrasts_csv, contrasts_latex, remarks

    if csv + latex + json_ > 1:
        raise InputError("Got more than one of --csv, --latex and --json; give one of them.")
    names = None if by is None else [name.strip() for name in by.split(",") if name.strip()]
    found = compare_runs(folders, by=names, split=split, draws=draws, level=level, seed=seed)
    if json_:
        print_json(found.to_dict())
    elif csv or latex:
        typer.echo((contrasts_csv if csv else contrasts_latex)(found), nl=False)
    else:
        _show(found)
    if not (json_ or latex):
        for sentence in remarks(found):
            say(sentence)


def _show(found: Contrasts) -> None:
    from palcache.pages.contrast_tables import HEADINGS, RULES, row_options

    columns = ["", *found.by, "runs", *HEADINGS.values(), "behind the first (95 % interval)", "p"]
    rows = [
        [
            f"{RULES[row.rule]}{' *' if row.best else ''}",
            *row_options(row, found.by),
            str(row.runs),
            *(_spread(row.metrics.get(name)) for name in HEADINGS),
            *_behind(row),
        ]
        for row in found.rows
    ]
    runs = len({path for row in found.rows for path in row.paths})
    print_table(
        f"{found.split}: {runs} runs, mean +- standard deviation over seeds", columns, rows, text=1 + len(found.by)
    )


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.4f}" if spread.deviation is None else f"{spread.mean:.4f} +- {spread.deviation:.4f}"


def _behind(row: ContrastRow) -> list[str]:
    if row.behind is None or row.p is None:
        return ["", ""]
    return [f"{row.behind.value:.3f} ({row.behind.low:.3f} to {row.behind.high:.3f})", f"{row.p:.4f}"]
