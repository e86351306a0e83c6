"""The Typer app. Importing it imports no verb: `palcache --help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from .failures import set_debug
from .verbs import Verbs

app = typer.Typer(
    name="palcache",
    cls=Verbs,
    help="Encode once, then train and evaluate pluralistic reward models (PAL) on cached embeddings.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from palcache import __version__

        typer.echo(f"palcache {__version__}")
        raise typer.Exit


@app.callback()
def root(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Encode once, then train and evaluate pluralistic reward models (PAL) on cached embeddings."""
    set_debug(debug)


def main() -> None:
    """Run the command line."""
    app()
