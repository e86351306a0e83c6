"""`palcache sweep`: a grid from the command line, a file or a recipe, one table, and an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.worlds import make_cache, planted_rows

GRID = "p=4 projector=mlp0-linear-dropout0 epochs=1 batch_size=64 "


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache of a planted world."""
    return make_cache(tmp_path_factory.mktemp("sweep") / "cache", *planted_rows()).path


def test_json_has_a_head_per_combination(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    result = invoke(
        "sweep", cache, "--sweep", tmp_path / "s", "--grid", f"{GRID} k=1,3 seed=0:2", "--device", "cpu", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    values = json.loads(result.stdout)
    assert values["sweep"] == str(tmp_path / "s")
    assert [(head["params"]["k"], head["params"]["seed"]) for head in values["heads"]] == [
        (1, 0),
        (1, 1),
        (3, 0),
        (3, 1),
    ]
    for head in values["heads"]:
        assert head["seconds"] > 0
        assert json.loads((Path(head["run"]) / "metrics.json").read_bytes())["test"] == head["test"]
        assert set(head["yardsticks"]) == {"user_blind", "longer"}
    assert "4 of 4 heads done" in result.stderr


def test_people_read_one_table_and_a_second_call_trains_nothing(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    command = ("sweep", cache, "--sweep", tmp_path / "s", "--grid", f"{GRID} lr=1e-2,3e-3", "--device", "cpu")
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    for words in ("2 of 2 heads", "lr", "0.003", "user-blind", "longer", "95 % interval"):
        assert words in result.stdout
    assert "results.csv has every figure" in result.stderr
    again = invoke(*command)
    assert again.exit_code == 0
    assert again.stdout == result.stdout


def test_a_file_and_the_command_line_go_together(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(
        "[fixed]\np = 4\nepochs = 1\nprojector = 'mlp0-linear-dropout0'\n[grid]\nk = [2, 3]\nseed = '0:4'\n"
    )
    result = invoke(
        "sweep", cache, "--sweep", tmp_path / "s", "--config", tmp_path / "sweep.toml", "--grid", "seed=7", "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert [head["params"]["seed"] for head in json.loads(result.stdout)["heads"]] == [7, 7]


def test_a_recipe_asks_for_new_users(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    result = invoke(
        "sweep",
        cache,
        "--sweep",
        tmp_path / "s",
        "--recipe",
        "pal-few-shot",
        "--grid",
        f"{GRID} seed=0:2",
        "--device",
        "cpu",
    )
    assert result.exit_code == 0, result.stderr
    assert "the curve of new users needs --new-comparisons" in result.stderr


def test_a_failing_head_is_named_and_the_exit_code_says_so(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    result = invoke("sweep", cache, "--sweep", tmp_path / "s", "--grid", f"{GRID} k=0,2", "--device", "cpu")
    assert result.exit_code == 1
    assert "1 of 2 heads" in result.stdout
    assert "failed" in result.stdout
    assert "Got k = 0; expected at least one prototype" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "The grid is empty; give --grid"),
        (("--grid", "sead=0:3"), "unknown key sead; did you mean seed?"),
        (("--grid", "k=1 k=2"), "k is there twice"),
        (("--recipe", "pal-group"), "There is no recipe pal-group; did you mean pal-groups?"),
        (("--recipe", "pal-groups", "--config", "x.toml"), "Got --config and --recipe; give one of them"),
        (("--config", "missing.toml"), "missing.toml cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    invoke: Invoke, cache: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = invoke("sweep", cache, "--sweep", tmp_path / "s", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "s").exists()
