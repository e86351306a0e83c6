"""`palcache users`: who a run knows, and how well."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .display import print_json, print_table, say
from .failures import reports_errors
from .options import JsonOption, RunArgument


@reports_errors
def users(
    run: RunArgument,
    *,
    limit: Annotated[int, typer.Option(help="Rows of the table; 0 shows all.")] = 50,
    json_: JsonOption = False,
) -> None:
    """List a run's users, seen and adapted: mixtures, comparisons they rest on, and uncertainty."""
    from palcache.runs.seen_users import list_users

    found = list_users(run)
    if json_:
        print_json({"run": str(run), "users": [asdict(user) for user in found]})
        return
    shown = found[:limit] if limit else found
    kinds = {kind: sum(user.kind == kind for user in found) for kind in ("seen", "adapted")}
    rows = [
        [
            user.user,
            user.kind,
            "-" if user.comparisons is None else f"{user.comparisons:,}",
            *(
                f"{weight:.2f}" if user.deviation is None else f"{weight:.2f} +- {user.deviation[j]:.2f}"
                for j, weight in enumerate(user.mixture)
            ),
        ]
        for user in shown
    ]
    weights = [f"w{j + 1}" for j in range(len(found[0].mixture))]
    print_table(
        f"{run}: {kinds['seen']:,} seen and {kinds['adapted']:,} adapted users; mixture +- posterior standard deviation",
        ("user", "kind", "comparisons", *weights),
        rows,
    )
    if len(shown) < len(found):
        say(f"{len(found) - len(shown):,} more users; --limit 0 or --json shows all")
