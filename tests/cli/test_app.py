"""Help and completion answer at once and import no torch; errors are one sentence and an exit code."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import palcache
from tests.cli.conftest import EXECUTABLE, Invoke

HEAVY = {"torch", "numpy", "transformers", "sentence_transformers", "h5py", "pyarrow", "matplotlib", "scipy"}
COMMANDS = (("embed",), ("train-head",), ("evaluate",), ("demo",), ("cache",), ("cache", "info"), ("cache", "verify"))


def test_help_names_every_command(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for (command,) in (names for names in COMMANDS if len(names) == 1):
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(invoke: Invoke, command: tuple[str, ...], option: str) -> None:
    result = invoke(*command, option)
    assert result.exit_code == 0
    assert f"palcache {' '.join(command)}" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("command", [names for names in COMMANDS if names != ("cache",)])
def test_every_command_has_json(invoke: Invoke, command: tuple[str, ...]) -> None:
    assert "--json" in invoke(*command, "--help").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"], ["train-head", "--help"], ["--version"]])
def test_help_imports_nothing_heavy_and_is_quick(arguments: list[str]) -> None:
    script = (
        "import sys, json\nfrom palcache_cli.app import main\n"
        f"sys.argv = ['palcache', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stderr.splitlines()[-1]))
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    )  # seconds of CPU; torch alone takes 2


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"palcache {palcache.__version__}\n")


def test_without_arguments_the_help_is_shown(invoke: Invoke) -> None:
    result = invoke()
    assert "Usage" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["train-head"], "Missing argument"),
        (["evaluate", "RUN"], "Missing option"),
        (["embed", "x.jsonl", "--cache", "c", "--ties", "maybe"], "--ties"),
        (["embed", "x.jsonl", "--cache", "c", "--dtype", "float8"], "--dtype"),
        (["train-head", "c", "--run", "r", "--k", "two"], "--k"),
        (["evaluate", "r", "--cache", "c", "--unknown-users", "maybe"], "--unknown-users"),
        (["cache", "verify", "c", "--reencode", "-1"], "--reencode"),
    ],
)
def test_wrong_usage_is_exit_code_2(invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_the_users_input_is_exit_code_2_and_one_sentence(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("cache", "info", tmp_path / "nothing")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: There is no cache at {tmp_path / 'nothing'}")
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_cache_is_exit_code_1(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "palcache.json").write_text("{")
    result = invoke("cache", "info", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("--debug", "cache", "info", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: There is no cache at")
    assert "Traceback" not in invoke("cache", "info", tmp_path / "nothing").stderr


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    if not EXECUTABLE.is_file():
        pytest.skip(f"needs {EXECUTABLE}: pip install -e .")
    done = subprocess.run(
        [str(EXECUTABLE), "evaluate", str(tmp_path), "--cache", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: There is no cache at {tmp_path}")


def test_the_app_is_the_one_in_the_repository(app: typer.Typer) -> None:
    """A stale installation elsewhere would be tested for nothing."""
    callback = app.registered_commands[0].callback
    assert callback is not None
    file = sys.modules[callback.__module__].__file__
    assert file is not None
    assert Path(file).resolve().parent == Path(__file__).resolve().parents[2] / "cli"
