"""One table from exceptions to messages and exit codes; no traceback without `--debug`."""

from __future__ import annotations

import functools
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer

from palcache.errors import CacheError, InputError, NumericsError, PalcacheError, PalcacheWarning, StorageError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (InputError, 2),
    (CacheError, 1),
    (NumericsError, 1),
    (StorageError, 1),
    (PalcacheError, 1),
    (KeyboardInterrupt, 130),
    (Exception, 1),
)
"""The first class that fits decides: 2 for the user's input, 1 for the rest, 130 and 143 for being stopped."""

_state = {"debug": False}


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


def set_debug(debug: bool) -> None:
    """Show tracebacks or not."""
    _state["debug"] = debug


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a command's exceptions into one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _terminable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PalcacheWarning)
            warnings.showwarning = _show_warning
            try:
                return command(*args, **kwargs)
            except (typer.Exit, BrokenPipeError):  # the reader of stdout has gone: Typer ends quietly
                raise
            except (Exception, KeyboardInterrupt) as error:
                if _state["debug"]:
                    traceback.print_exc()
                typer.echo(_message(error), err=True)
                code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
                raise typer.Exit(143 if isinstance(error, Terminated) else code) from None

    return wrapped


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "\nStopped; what was finished is kept. Run the same command again to go on (train-head: with --resume)."
    if isinstance(error, PalcacheError):
        return f"Error: {error}"
    return f"Error: {type(error).__name__}: {error} (unexpected; run again with palcache --debug ... and report it)"


def _show_warning(message: Warning | str, category: type[Warning], *_args: Any, **_kwargs: Any) -> None:
    if issubclass(category, PalcacheWarning):
        typer.echo(f"Warning: {message}", err=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """Stop as cleanly on SIGTERM as on Ctrl-C."""

    def stop(_number: int, _frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.stderr.flush()
