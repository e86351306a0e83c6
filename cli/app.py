"""The Typer app. Importing it imports no torch: `--help` and completion answer at once."""

from __future__ import annotations

from typing import Annotated

import typer

from . import (
    adapt,
    cache,
    checkpoint,
    compare,
    demo,
    embed,
    evaluate,
    import_vectors,
    lint,
    presets,
    report,
    suggest,
    sweep,
    train_head,
    users,
)
from .failures import set_debug

app = typer.Typer(
    name="palcache",
    help="Encode once, then train and evaluate pluralistic reward models (PAL) on cached embeddings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("embed")(embed.embed)
app.command("import")(import_vectors.import_vectors)
app.command("train-head")(train_head.train_head)
app.command("sweep")(sweep.sweep)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("adapt")(adapt.adapt)
app.command("suggest")(suggest.suggest)
app.command("users")(users.users)
app.command("lint")(lint.lint)
app.command("demo")(demo.demo)
app.command("presets")(presets.presets)
app.add_typer(cache.app, name="cache")
app.add_typer(checkpoint.app, name="checkpoint")


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
