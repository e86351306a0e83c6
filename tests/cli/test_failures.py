"""One table decides what people read and what the shell sees."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import typer
from palcache_cli import failures
from palcache_cli.failures import EXIT_CODES, Terminated

from palcache.errors import (
    CacheError,
    InputError,
    MismatchError,
    ModelError,
    NumericsError,
    PalcacheError,
    PalcacheWarning,
    StorageError,
)

T = TypeVar("T")


def reports_errors(command: Callable[[], T]) -> Callable[[], T]:
    """Wrap a command as the app does, with types (mypy does not see installed packages)."""
    wrapped: Callable[[], T] = failures.reports_errors(command)
    return wrapped


@pytest.fixture(autouse=True)
def without_debug() -> Iterator[None]:
    """Leave the switch as it was."""
    failures.set_debug(False)
    yield
    failures.set_debug(False)


def code_of(error: BaseException) -> int:
    @reports_errors
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    return int(caught.value.exit_code)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("Got x."), 2, "Error: Got x.\n"),
        (ModelError("Got x."), 2, "Error: Got x.\n"),
        (MismatchError("Got x."), 2, "Error: Got x.\n"),
        (CacheError("Got x."), 1, "Error: Got x.\n"),
        (NumericsError("Got x."), 1, "Error: Got x.\n"),
        (StorageError("Got x."), 1, "Error: Got x.\n"),
        (PalcacheError("Got x."), 1, "Error: Got x.\n"),
        (ZeroDivisionError("x"), 1, "Error: ZeroDivisionError: x (unexpected; run again with palcache --debug"),
        (KeyboardInterrupt(), 130, "\nStopped; what was finished is kept."),
        (Terminated(), 143, "\nStopped; what was finished is kept."),
    ],
)
def test_every_error_has_its_code_and_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(error) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_every_error_of_the_library_is_in_the_table() -> None:
    listed = [kind for kind, _ in EXIT_CODES]
    for kind in (InputError, CacheError, NumericsError, StorageError, PalcacheError, KeyboardInterrupt, Exception):
        assert kind in listed
    for i, kind in enumerate(listed):  # an earlier entry would hide a later one of its own kind
        assert not any(issubclass(kind, earlier) for earlier in listed[:i])


@pytest.mark.parametrize("error", [InputError("x"), KeyboardInterrupt(), ZeroDivisionError("x")])
def test_debug_adds_a_traceback_and_nothing_else(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    plain = code_of(error)
    said = capsys.readouterr().err
    failures.set_debug(True)
    assert code_of(error) == plain
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith(said)


def test_warnings_of_the_library_are_one_line_and_others_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    @reports_errors
    def command() -> int:
        warnings.warn("something was left out", PalcacheWarning, stacklevel=1)
        warnings.warn("a library is old", DeprecationWarning, stacklevel=1)
        warnings.warn("a library is loud", UserWarning, stacklevel=1)
        return 7

    assert command() == 7
    assert capsys.readouterr().err == "Warning: something was left out\n"


def test_an_exit_passes_through() -> None:
    @reports_errors
    def command() -> None:
        raise typer.Exit(1)

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == 1


def test_a_reader_that_has_gone_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    @reports_errors
    def command() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError, match="Broken pipe"):  # Typer ends quietly
        command()
    assert capsys.readouterr().err == ""


def test_sigterm_stops_a_command_cleanly_and_its_handler_is_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    finished = []

    @reports_errors
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            finished.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == 143
    assert finished == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Stopped" in capsys.readouterr().err


def test_a_command_works_outside_the_main_thread() -> None:
    found: list[int] = []

    @reports_errors
    def command() -> None:
        found.append(3)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert found == [3]
