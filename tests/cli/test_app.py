"""Help and completion answer at once and import no torch; errors are one sentence and an exit code."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from palcache_cli.verbs import VERBS

import palcache
from tests.cli.conftest import EXECUTABLE, Invoke
from tests.commands import walk_commands

CLI = Path(__file__).resolve().parents[2] / "cli"
HEAVY = {"torch", "numpy", "transformers", "sentence_transformers", "h5py", "pyarrow", "matplotlib", "scipy"}
COMMANDS = dict(walk_commands())
GROUPS = {names for names, command in COMMANDS.items() if hasattr(command, "commands")}


def test_help_names_every_command_in_a_whole_line(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.partition("Commands:")[2].splitlines() if line]
    assert [name for name, _ in lines] == [names[0] for names in COMMANDS if len(names) == 1]
    assert all(said.endswith(".") and not said.endswith("...") for _, said in lines)


def test_every_module_of_a_command_is_found() -> None:
    """A verb's file that is not listed could not be reached."""
    files = {path.stem for path in CLI.glob("*.py") if "@reports_errors" in path.read_text(encoding="utf-8")}
    assert files == {module for module, _ in VERBS.values()} | {"cache_care"}
    assert len(COMMANDS) >= 22
    assert {("cache",), ("checkpoint",)} == GROUPS


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(invoke: Invoke, command: tuple[str, ...], option: str) -> None:
    result = invoke(*command, option)
    assert result.exit_code == 0
    assert f"palcache {' '.join(command)}" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("command", [names for names in COMMANDS if names not in GROUPS], ids=" ".join)
def test_every_command_has_json(invoke: Invoke, command: tuple[str, ...]) -> None:
    assert "--json" in invoke(*command, "--help").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"], ["train-head", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys, json\nfrom palcache_cli.app import main\n"
        f"sys.argv = ['palcache', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


def cpu_seconds(*arguments: str) -> float:
    """Return the least CPU time that Python took for this in three tries."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_help_takes_little_more_than_importing_typer() -> None:
    """0.3 s is the goal; a slow machine is slow at both. With all verbs imported and rich it was four times typer alone."""
    typer_alone, taken = cpu_seconds("-c", "import typer"), cpu_seconds("-m", "palcache_cli", "--help")
    assert taken < max(0.3, 2 * typer_alone)


def test_help_imports_no_verb() -> None:
    script = (
        "import sys\nfrom palcache_cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*(name for name in sys.modules if name.startswith(('palcache_cli.', 'rich'))), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stderr.split()) == {"palcache_cli.app", "palcache_cli.failures", "palcache_cli.verbs"}


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
        (["evalute"], "Did you mean 'evaluate'?"),
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
    assert app.registered_callback is not None
    callback = app.registered_callback.callback
    assert callback is not None
    file = sys.modules[callback.__module__].__file__
    assert file is not None
    assert Path(file).resolve().parent == CLI
