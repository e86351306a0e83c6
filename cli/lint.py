"""`palcache lint`: what would make results look better than they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .display import print_json
from .failures import reports_errors
from .options import CacheArgument, JsonOption


@reports_errors
def lint(
    cache: CacheArgument,
    *,
    run: Annotated[
        Path | None,
        typer.Option(help="A run on it: also compares test with train, and seen with new users.", show_default=False),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Warn of leaks and tells in a cache's tables and of unsound vectors. Exit code 1 where there is a warning."""
    from palcache.cache import Cache
    from palcache.lints import lint_cache

    found = lint_cache(Cache(cache), run=run)
    if json_:
        print_json({"clean": not found, "warnings": [asdict(warning) for warning in found]})
    else:
        for warning in found:
            typer.echo(f"{warning.code}: {warning.where}: {warning.message}")
            for example in warning.examples:
                typer.echo(f"    {example}")
        typer.echo(f"{cache}: {f'{len(found)} warning(s)' if found else 'no warnings'}")
    if found:
        raise typer.Exit(1)
