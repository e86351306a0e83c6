"""The installed app, in this process and in its own."""

from __future__ import annotations

import importlib
import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

Invoke = Callable[..., Result]
EXECUTABLE = Path(sys.executable).parent / "palcache"


@pytest.fixture(scope="session")
def app() -> typer.Typer:
    """Return the app behind the installed entry point."""
    (entry,) = set(importlib.metadata.entry_points(group="console_scripts", name="palcache"))
    found = importlib.import_module(entry.module).app
    assert isinstance(found, typer.Typer)
    return found


@pytest.fixture
def invoke(app: typer.Typer) -> Invoke:
    """Return a function that runs the app in this process."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Give a function that starts the installed command in a process of its own, which heeds Ctrl-C.

    A shell starts jobs in the background deaf to SIGINT, and their children would be so too.
    """
    if not EXECUTABLE.is_file():
        pytest.skip(f"needs {EXECUTABLE}: pip install -e .")

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [str(EXECUTABLE), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield start
    signal.signal(signal.SIGINT, before)
