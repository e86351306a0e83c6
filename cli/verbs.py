"""The verbs of the command line by name: a verb's module is imported when it is asked for, and not for `palcache --help`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import typer
from typer.core import TyperGroup

VERBS: Final[Mapping[str, tuple[str, str]]] = {
    "embed": ("embed", "Encode every distinct prompt and response, once."),
    "import": ("import_vectors", "Store vectors that were made elsewhere."),
    "train-head": ("train_head", "Train a head on cached vectors."),
    "sweep": ("sweep", "Train many heads at once."),
    "evaluate": ("evaluate", "Evaluate a head: intervals, calibration, yardsticks."),
    "compare": ("compare", "Compare runs over seeds."),
    "report": ("report", "Write one HTML page about a run or a sweep."),
    "adapt": ("adapt", "Adapt a frozen head to new users."),
    "suggest": ("suggest", "Suggest what to ask a user next."),
    "users": ("users", "List a run's users and their mixtures."),
    "lint": ("lint", "Warn of leaks, tells and unsound settings."),
    "demo": ("demo", "Run the whole job on a small table."),
    "presets": ("presets", "List the published configurations."),
    "cache": ("cache", "Look into a cache, check it and take care of it."),
    "checkpoint": ("checkpoint", "Read and write published checkpoints."),
}
"""Each verb's module, and the line that `palcache --help` has for it."""


class Verbs(TyperGroup):
    """The group of `VERBS`; Typer makes it, and so passes what a group takes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = cast("Any", _Commands())  # Typer reads it alone

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - what Typer calls
        """Write each verb and its line; nothing is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


class _Commands(Mapping[str, Any]):
    """The verbs' commands; reading one imports its module."""

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)

    def __getitem__(self, name: str) -> Any:
        module, _ = VERBS[name]
        found = importlib.import_module(f".{module}", __package__)
        app = getattr(found, "app", None)  # a verb with commands of its own
        if app is None:
            app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            app.command(name)(getattr(found, module))
        command = typer.main.get_command(app)
        command.name = name
        return command
