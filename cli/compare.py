"""`palcache compare`: runs side by side, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palcache.choices import RULE_NAMES
from palcache.errors import InputError

from .display import print_json, print_table, say
from .failures import reports_errors
from .options import JsonOption

if TYPE_CHECKING:
    from palcache.contrasts import Contrasts


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
    from palcache.pages.contrast_tables import HEADINGS, behind_cells, row_options, spread_text

    columns = ["", *found.by, "runs", *HEADINGS.values(), "behind the first (95 % interval)", "p"]
    rows = [
        [
            f"{RULE_NAMES[row.rule]}{' *' if row.best else ''}",
            *row_options(row, found.by),
            str(row.runs),
            *(spread_text(row.metrics.get(name)) for name in HEADINGS),
            *behind_cells(row),
        ]
        for row in found.rows
    ]
    runs = len({path for row in found.rows for path in row.paths})
    print_table(
        f"{found.split}: {runs} runs, mean +- standard deviation over seeds", columns, rows, text=1 + len(found.by)
    )
