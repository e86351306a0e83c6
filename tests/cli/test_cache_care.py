"""The commands that take care of a cache, through the installed app."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palcache.cache import Cache
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import embed_comparisons
from tests.stubs import StubEncoder, flip_bit, small_table

PALCACHE = str(Path(sys.executable).parent / "palcache")


def run(*words: object, code: int = 0) -> str:
    """Run a command and return what it printed on stdout, or on stderr where it failed."""
    done = subprocess.run([PALCACHE, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr + done.stdout


def run_json(*words: object) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(*words, "--json"))
    return value


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache with two tables."""
    for label in "ab":
        embed_comparisons(
            small_table(label=label), StubEncoder(), Cache.create(tmp_path / "c"), name=label,
            config=EmbedConfig(dtype="float32", shard_rows=4),
        )  # fmt: skip
    return tmp_path / "c"


def test_care_from_listing_to_export(cache: Path, tmp_path: Path) -> None:
    assert [table["name"] for table in run_json("cache", "ls", cache)["comparisons"]] == ["a", "b"]
    assert run_json("cache", "rm", cache, "b") == {"path": str(cache), "removed": ["b"], "left": ["a"]}
    assert run_json("cache", "compact", cache, "--plan")["rows_dropped"] == 18
    assert "dropped 18 of 36 rows and 0 spaces" in run("cache", "compact", cache)
    assert run_json("cache", "merge", cache, "--into", tmp_path / "m")["rows_added"] == 18
    assert "18 vectors" not in run("cache", "export", cache, tmp_path / "out", "--format", "npy", "--space", "response")
    spaces = run_json("cache", "export", cache, tmp_path / "out", "--space", "response")["spaces"]
    assert (spaces[0]["rows"], spaces[0]["texts"]) == (13, 13)
    assert Path(spaces[0]["paths"][0]).is_file()
    found = run_json("cache", "verify", cache, "--repair")
    assert (found["sound"], found["repair"]["shards_restored"]) == (True, 0)


def test_a_damaged_header_is_mended_from_the_command_line(cache: Path) -> None:
    flip_bit(next((cache / "spaces").rglob("0*.h5")), 3)
    assert "NOT sound, 1 problem" in run("cache", "verify", cache, code=1)
    assert "1 shards byte for byte" in run("cache", "verify", cache, "--repair")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rm", "{cache}", "a", "zebra"), "has no comparison table zebra; it has a, b: nothing was removed"),
        (("compact", "{cache}", "--shard-rows", "0"), "Got shard_rows = 0"),
        (("merge", "{cache}", "--into", "{cache}"), "would be merged into itself"),
        (("export", "{cache}", "{cache}-out", "--space", "zebra"), "Got --space zebra"),
        (("ls", "{cache}-none"), "There is no cache at"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(cache: Path, words: tuple[str, ...], message: str) -> None:
    said = run("cache", *(word.format(cache=cache) for word in words), code=2)
    assert message in said
    assert Cache(cache).comparison_names == ["a", "b"]


def test_device_and_devices_are_not_given_together(tmp_path: Path) -> None:
    words = ("embed", "table.jsonl", "--cache", tmp_path / "c", "--device", "cpu", "--devices", "cpu:2")
    assert "Got --device cpu and --devices cpu:2; give one of them" in run(*words, code=2)


def test_the_module_runs_as_the_app() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "palcache_cli", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("palcache ")
