"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palcache.configs import UnknownUsers
from palcache.errors import InputError

CacheArgument = Annotated[Path, typer.Argument(help="The cache folder.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
SpacesCacheOption = Annotated[Path, typer.Option("--cache", help="The cache folder.", show_default=False)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ComparisonsOption = Annotated[
    str | None, typer.Option(help="Name of the comparison table; a cache with one needs none.", show_default=False)
]
UnknownUsersOption = Annotated[
    UnknownUsers, typer.Option(help="Users the head does not know: refuse, score with the mean mixture, or drop.")
]


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, str]:
    """Return `["user_id=worker"]` as `{"user_id": "worker"}`.

    Raises:
        InputError: a pair has no equals sign.
    """
    out = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"Got {option} {pair!r}; expected NAME=COLUMN, for example {option} user_id=worker.")
        out[name] = value
    return out
