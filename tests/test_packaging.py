"""What is installed is what is on disk: a folder left out of the list works here and is missing from the wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import palcache

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


FOLDERS = ("palcache", "cli", "data", "docs", "tests", "benchmarks")


def modules_in(folder: Path) -> set[str]:
    """Return the Python files below a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if "__pycache__" not in path.parts}


def data_files() -> set[Path]:
    """Return the files of the package that are no modules."""
    return {
        path
        for path in (ROOT / "palcache").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }


def test_the_packages_listed_are_the_folders_on_disk() -> None:
    folders = {path.parent for top in ("palcache", "cli") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts).replace("cli", "palcache_cli", 1) for folder in folders}
    assert names == set(SETUPTOOLS["packages"])
    assert len(SETUPTOOLS["packages"]) == len(names)


@pytest.mark.parametrize("name", SETUPTOOLS["packages"])
def test_every_package_has_an_init_with_a_docstring(name: str) -> None:
    folder = ROOT.joinpath(*name.replace("palcache_cli", "cli", 1).split("."))
    assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_every_file_of_the_package_is_installed() -> None:
    """Types, and what the package reads of itself: nothing else lies there."""
    listed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert data_files() == listed
    assert (ROOT / "palcache" / "py.typed").is_file()


def test_the_version_is_the_same_everywhere() -> None:
    assert palcache.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("palcache")


def test_the_command_is_installed() -> None:
    found = importlib.metadata.entry_points(group="console_scripts", name="palcache")
    assert {entry.value for entry in found} == {PROJECT["project"]["scripts"]["palcache"]} == {"palcache_cli.app:main"}
    assert all(callable(entry.load()) for entry in found)


def test_files_that_the_metadata_names_are_there() -> None:
    project = PROJECT["project"]
    for name in (project["readme"], *project["license-files"], "CHANGELOG.md", "MANIFEST.in"):
        assert (ROOT / name).is_file(), name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel and an sdist with the installed setuptools, without a network, from a copy of the tree."""
    setuptools = importlib.util.find_spec("setuptools")
    if setuptools is None or int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or newer in this environment")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in FOLDERS:
        copy_tree(ROOT / name, tree / name)
    for path in ROOT.iterdir():
        if path.is_file():
            (tree / path.name).write_bytes(path.read_bytes())
    script = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    return out


def copy_tree(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def test_the_wheel_holds_every_module_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = [name for name in wheel.namelist() if name.endswith("LICENSE")]
    expected = {f"palcache/{name}" for name in modules_in(ROOT / "palcache")}
    expected |= {path.relative_to(ROOT).as_posix() for path in data_files()}
    expected |= {f"palcache_cli/{name}" for name in modules_in(ROOT / "cli")}
    assert names == expected
    assert licences


def test_a_page_is_written_from_the_wheel_alone(built: Path, tmp_path: Path) -> None:
    """The page reads its style and script from the package: a misplaced asset shows only where it is installed."""
    wheel = str(next(built.glob("*.whl")))
    script = (
        "import sys, importlib.machinery\n"
        f"sys.path.insert(0, {wheel!r})\n"
        "sys.meta_path.insert(0, importlib.machinery.PathFinder)  # before what an editable installation adds\n"
        "from palcache.pages import markup\n"
        f"assert markup.__file__.startswith({wheel!r}), markup.__file__\n"
        "markup._library = lambda: ''\n"
        "sys.stdout.buffer.write(markup.document('title', markup.text('content'), {}, {}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("page.css", "page.js"):
        assert (ROOT / "palcache" / "pages" / "assets" / name).read_text(encoding="utf-8") in done.stdout


def test_the_sdist_holds_what_the_tests_need(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"tests/golden/v1.tar.xz", "benchmarks/__init__.py", "data/sample.jsonl"} <= expected <= names
    assert {"README.md", "LICENSE", "pyproject.toml", "Makefile", "CONTRIBUTING.md", "MANIFEST.in"} <= names
    assert not [name for name in names if "__pycache__" in name]
