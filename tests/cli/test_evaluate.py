"""`palcache evaluate`: a run's head and the yardsticks, on its own table or another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palcache.configs import FitConfig, HeadConfig
from palcache.runs.trainings import RunResult, train_run
from tests.cli.conftest import Invoke
from tests.worlds import KnownVectors, make_cache, planted_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache of a planted world."""
    return make_cache(tmp_path_factory.mktemp("evaluate") / "cache", *planted_rows()).path


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Return a short run on it."""
    from palcache.cache import Cache

    path = tmp_path_factory.mktemp("run") / "run"
    return train_run(Cache(cache), path, head=HeadConfig(k=3, p=4), config=FitConfig(epochs=2), device="cpu")


def test_json_repeats_what_training_found(invoke: Invoke, cache: Path, run: RunResult) -> None:
    result = invoke("evaluate", run.path, "--cache", cache, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    values = json.loads(result.stdout)
    trained = json.loads((run.path / "metrics.json").read_bytes())
    assert values.keys() == {"run", "seconds", "test", "val", "yardsticks"}
    for split in ("test", "val"):
        assert values[split] == trained[split]
        assert {"micro", "macro"} <= values[split]["accuracy"].keys()
        assert values["yardsticks"]["longer"][split] == trained["yardsticks"]["longer"][split]
    assert values["seconds"] > 0


@pytest.mark.parametrize("split", ["val", "train", "all"])
def test_a_split_names_its_numbers(invoke: Invoke, cache: Path, run: RunResult, split: str) -> None:
    values = json.loads(invoke("evaluate", run.path, "--cache", cache, "--split", split, "--json").stdout)
    assert values[split]["n"] > 40
    assert set(values["yardsticks"]["user_blind"]) == {split, "val"}


def test_people_read_a_table(invoke: Invoke, cache: Path, run: RunResult) -> None:
    result = invoke("evaluate", run.path, "--cache", cache)
    assert result.exit_code == 0
    micro = run.evaluations["test"]["head"].accuracy["micro"]
    assert f"{micro.value:.4f}" in result.stdout
    assert f"{micro.low:.3f} to {micro.high:.3f}" in result.stdout
    assert "temperature fitted on validation: " in result.stdout
    assert "longer response" in result.stdout


def test_groups_are_shown_where_they_are_known(invoke: Invoke, sample_cache: Path, sample_run: RunResult) -> None:
    result = invoke("evaluate", sample_run.path, "--cache", sample_cache)
    groups = sample_run.evaluations["test"]["head"].groups
    assert set(groups) == {"adventurous", "homely"}
    for name, accuracy in groups.items():
        assert f"group {name}: {accuracy:.4f}" in result.stdout


def test_one_user_has_no_interval(invoke: Invoke, run: RunResult, tmp_path: Path) -> None:
    rows, encoder = planted_rows()
    cache = make_cache(tmp_path / "cache", [row for row in rows if row["user_id"] == "user 3"], encoder).path
    result = invoke("evaluate", run.path, "--cache", cache, "--json")
    values = json.loads(result.stdout)
    assert values["test"]["accuracy"]["interval"]["micro"] is None
    assert "val" not in values  # another table's validation comparisons say nothing of this run
    assert "nan" not in invoke("evaluate", run.path, "--cache", cache).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--split", "nothing"],
            "has no comparisons in the split nothing; it has test, train, val: choose one with --split",
        ),
        (["--comparisons", "nothing"], "no comparison table nothing; it has table"),
        (["--device", "abacus"], "Got the device 'abacus'"),
    ],
)
def test_wrong_options_are_one_sentence(
    invoke: Invoke, cache: Path, run: RunResult, options: list[str], message: str
) -> None:
    result = invoke("evaluate", run.path, "--cache", cache, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_folder_that_is_no_run_is_exit_code_2(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    result = invoke("evaluate", tmp_path, "--cache", cache)
    assert result.exit_code == 2
    assert "is no run folder" in result.stderr


def test_a_cache_of_another_encoder_is_refused(invoke: Invoke, run: RunResult, tmp_path: Path) -> None:
    rows, encoder = planted_rows()
    make_cache(tmp_path / "cache", rows, KnownVectors(encoder.vectors, encoder.width, "another"))
    result = invoke("evaluate", run.path, "--cache", tmp_path / "cache")
    assert result.exit_code == 2
    assert "was trained on the vectors of known" in result.stderr


def test_strangers_are_refused_dropped_or_scored(invoke: Invoke, run: RunResult, tmp_path: Path) -> None:
    rows, encoder = planted_rows()
    rows = [{**row, "user_id": "new"} if at % 2 else row for at, row in enumerate(rows)]
    make_cache(tmp_path / "cache", rows, encoder)
    command = ("evaluate", run.path, "--cache", tmp_path / "cache", "--split", "all", "--json")
    refused = invoke(*command)
    assert refused.exit_code == 2
    assert "does not know the user 'new' (1 such users, 210 comparisons)" in refused.stderr
    n = {p: json.loads(invoke(*command, "--unknown-users", p).stdout)["all"]["n"] for p in ("generic", "drop")}
    assert n == {"generic": 420, "drop": 210}


def test_a_table_of_strangers_alone_leaves_nothing_to_evaluate(invoke: Invoke, run: RunResult, tmp_path: Path) -> None:
    rows, encoder = planted_rows()
    make_cache(tmp_path / "cache", [{**row, "user_id": "new"} for row in rows], encoder)
    result = invoke("evaluate", run.path, "--cache", tmp_path / "cache", "--unknown-users", "drop")
    assert result.exit_code == 2
    assert "There are no comparisons to evaluate" in result.stderr
