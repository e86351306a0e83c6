"""The commands of the command line, as the app has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from palcache_cli.app import app


def walk_commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Give the names of each command, as a user types them, with the command; groups come before their commands."""
    yield from _below(typer.main.get_command(app), ())


def _below(group: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in getattr(group, "commands", {}).items():
        yield (*names, name), command
        yield from _below(command, (*names, name))
