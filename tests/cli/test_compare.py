"""`palcache compare` and `palcache report` through the installed app."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palcache.configs import FitConfig, HeadConfig
from tests.browsers import needs_charts
from tests.cli.conftest import Invoke
from tests.made_runs import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of k = 1 and 2 with two seeds each; k = 2 is clearly better."""
    folder = tmp_path_factory.mktemp("runs")
    for k, skill in ((1, 0.2), (2, 1.5)):
        for seed in range(2):
            make_run(folder / f"k{k}-s{seed}", head=HeadConfig(k=k, p=3), fit=FitConfig(seed=seed), skill=skill)
    return folder


def test_the_table_marks_the_best_and_says_how(invoke: Invoke, runs: Path) -> None:
    done = invoke("compare", runs, "--by", "k", "--draws", 500)
    assert done.exit_code == 0, done.output
    assert "test: 4 runs, mean +- standard deviation over seeds" in done.stdout
    assert [line.split()[:3] for line in done.stdout.splitlines() if line.startswith(" head *")] == [["head", "*", "2"]]
    assert "paired bootstrap over users (500 draws)" in done.stderr


def test_other_forms_are_data_on_stdout(invoke: Invoke, runs: Path) -> None:
    values = json.loads(invoke("compare", runs, "--json", "--draws", 500).stdout)
    assert values["test"] == {"method": "paired bootstrap over users, Holm", "draws": 500, "level": 0.05}
    assert values["rows"][1]["metrics"]["micro"].keys() == {"mean", "deviation"}
    assert invoke("compare", runs, "--csv").stdout.startswith("rule,k,runs,micro,micro_deviation,")
    latex = invoke("compare", runs, "--latex").stdout
    assert latex.startswith("% Split: test.")
    assert r"\toprule" in latex


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{runs}", "--csv", "--json"), "Got more than one of --csv, --latex and --json"),
        (("{runs}/k1-s0/none",), "holds none; give a folder"),
        (("{runs}", "--draws", "0"), "Got 0 draws and the level 0.05"),
        (("{runs}", "--by", "learning_rate"), "No run has an option learning_rate"),
        (("{runs}", "--split", "train"), "Got the split train; expected one of val, test"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    invoke: Invoke, runs: Path, words: tuple[str, ...], message: str
) -> None:
    done = invoke("compare", *(word.format(runs=runs) for word in words))
    assert done.exit_code == 2
    assert message in done.output


def test_a_run_that_is_left_out_is_said(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "new")
    (tmp_path / "new" / "metrics.json").unlink()
    assert "new is left out: it is not finished." in invoke("compare", runs, tmp_path).stderr


@needs_charts
def test_report_writes_a_page(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    done = invoke("report", runs / "k2-s0", "--out", tmp_path / "page.html", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "page.html").stat().st_size
    done = invoke("report", tmp_path, "--out", tmp_path / "other.html")
    assert done.exit_code == 2
    assert "is no run folder and holds none" in done.output


def test_an_unknown_log_is_refused_before_training(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("train-head", tmp_path, "--run", tmp_path / "run", "--log", "mlflow")
    assert done.exit_code == 2
    assert "Got the log 'mlflow'; expected one of tensorboard, wandb" in done.output
    assert not (tmp_path / "run").exists()
