"""`import palcache` is light, and every public name is where mypy and Python both find it."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import palcache

STAGE_2 = (
    "palcache.tensors",
    "palcache.heads",
    "palcache.losses",
    "palcache.checkpoints",
    "palcache.training",
    "palcache.metrics",
    "palcache.evaluation",
    "palcache.reports",
    "palcache.runs.trainings",
)


def loaded_by(code: str) -> set[str]:
    """Return the names of the top-level modules that a fresh Python has loaded after some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", palcache.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(palcache, name)
    assert value.__doc__
    assert value.__module__.startswith("palcache.")


def test_the_names_for_type_checkers_are_the_public_ones() -> None:
    tree = ast.parse(Path(palcache.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    homes = {
        alias.name: node.module
        for node in imports
        for alias in node.names
        if (node.module or "").startswith("palcache")
    }
    assert sorted(homes) == palcache.__all__
    for name, module in homes.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(palcache, name)


def test_dir_lists_the_public_names() -> None:
    assert {*palcache.__all__, "__version__"} == set(dir(palcache))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'palcache' has no attribute 'nothing'"):
        _ = palcache.nothing


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "sentence_transformers",
        "h5py",
        "pyarrow",
        "matplotlib",
        "typer",
        "rich",
    }
    assert not loaded_by("import palcache; dir(palcache); palcache.__version__") & heavy
    assert "torch" in loaded_by("import palcache; palcache.fit")


def test_stage_2_runs_where_transformers_is_not_installed() -> None:
    """Both packages are blocked, and a head is then trained and evaluated without them."""
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"transformers", "sentence_transformers", "tokenizers"}}:
            raise ImportError(f"blocked {{name}}")
sys.meta_path.insert(0, Blocker())
import importlib
for name in {STAGE_2!r}:
    importlib.import_module(name)
import palcache, tempfile
from pathlib import Path
from tests.worlds import make_cache, planted_rows
with tempfile.TemporaryDirectory() as folder:
    cache = make_cache(Path(folder) / "cache", *planted_rows(per_user=20))
    run = palcache.train_run(cache, Path(folder) / "run", config=palcache.FitConfig(epochs=1), device="cpu")
    assert palcache.evaluate_run(run.path, cache) == run.evaluations["test"]
try:
    import transformers
except ImportError as error:
    assert "blocked" in str(error)
else:
    raise AssertionError("the blocker does not block")
"""
    loaded = loaded_by(code)
    assert not {"transformers", "sentence_transformers", "typer", "rich"} & loaded
