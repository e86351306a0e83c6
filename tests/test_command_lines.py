"""Every `palcache` line in the README and the documents names a command and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import walk_commands

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = dict(walk_commands())


def command_lines(text: str, *languages: str) -> list[str]:
    """Return the `palcache` lines of a page's blocks of these languages, whole where a backslash breaks them."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    chosen = [block for language, block in blocks if language in languages]
    lines = [line.strip() for block in chosen for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("palcache ")]


def unknown_parts(line: str) -> list[str]:
    """Return what a line says that the app has not: its command, or options."""
    words = shlex.split(line, comments=True)[1:]
    names = tuple(words[:2]) if tuple(words[:2]) in COMMANDS else tuple(words[:1])
    if names not in COMMANDS or hasattr(COMMANDS[names], "commands"):
        return [" ".join(words[:2])]
    options = {name for parameter in COMMANDS[names].params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.partition("=")[0] for word in words[len(names) :] if re.match(r"--?[a-z]", word)]
    return [option for option in given if option not in options | {"-h", "--help"}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {line: said for line in command_lines(text, "bash", "sh") if (said := unknown_parts(line))} == {}
    assert command_lines(text, "") == [], "a block of commands begins with ```sh"


def test_the_readme_shows_most_of_the_commands() -> None:
    assert len(command_lines((ROOT / "README.md").read_text(encoding="utf-8"), "bash", "sh")) > 20


def test_what_does_not_exist_is_found() -> None:
    assert unknown_parts("palcache train-head CACHE --run RUN --kk 2  # --nothing") == ["--kk"]
    assert unknown_parts("palcache cache melt CACHE") == ["cache melt"]
    assert unknown_parts("palcache trainhead CACHE") == ["trainhead CACHE"]
