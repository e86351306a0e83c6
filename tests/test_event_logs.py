"""Logs tell TensorBoard and Weights & Biases every evaluation and what came out, and change nothing else."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig
from palcache.errors import InputError, NumericsError, PalcacheError
from palcache.event_logs import final_metrics, finish_logs, log_run, open_logs
from palcache.runs.folders import LOGS, RunResult
from palcache.runs.trainings import train_run
from palcache.sweeps.grids import parse_grid
from palcache.sweeps.sweeps import SweepHead, run_sweep
from palcache.training import FitProgress
from tests.worlds import files_of, make_cache, planted_rows

FIT = FitConfig(batch_size=64, epochs=2, evaluations=3, patience=0)
HEAD = HeadConfig(k=2, p=4)
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard: pip install '.[tensorboard]'"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a planted world's cache."""
    return make_cache(tmp_path_factory.mktemp("logs") / "cache", *planted_rows())


def train(
    cache: Cache, path: Path, *kinds: str, fit: FitConfig = FIT, **options: Any
) -> tuple[RunResult, list[FitProgress]]:
    """Train with logs; return the run and the events that they got."""
    logs, events = open_logs(kinds, path), list[FitProgress]()

    def tell(event: FitProgress) -> None:
        events.append(event)
        for log in logs:
            log(event)

    result = train_run(cache, path, head=HEAD, config=fit, device="cpu", on_progress=tell, **options)
    finish_logs(logs, result)
    return result, events


@dataclass
class FakeRun:
    """What wandb.init returns, as far as it is used."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    defined: list[str] = field(default_factory=list)
    finished: int = 0

    def log(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)

    def define_metric(self, name: str, **_options: Any) -> None:
        """Keep a name."""
        self.defined.append(name)

    def finish(self) -> None:
        """Count."""
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    """Put a stand-in where wandb is imported; return what it is asked for."""
    started: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**options: Any) -> FakeRun:
        started.append((options, FakeRun()))
        return started[-1][1]

    module = ModuleType("wandb")
    vars(module).update(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return started


@needs_tensorboard
def test_tensorboard_gets_every_evaluation_and_the_outcome(cache: Cache, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    result, events = train(cache, tmp_path / "run", "tensorboard")
    found = EventAccumulator(str(tmp_path / "run" / LOGS / "tensorboard"))
    found.Reload()
    for rule in ("head", "user_blind"):
        rows = [event.row for event in events if event.rule == rule]
        for name in ("train_loss", "val_loss", "val_accuracy"):
            scalars = found.Scalars(f"{rule}/{name}")
            assert [scalar.step for scalar in scalars] == [row.step for row in rows]
            assert [scalar.value for scalar in scalars] == pytest.approx([getattr(row, name) for row in rows], rel=1e-6)
    metrics = final_metrics(result)
    assert metrics["test/head/accuracy"] == result.evaluations["test"]["head"].accuracy["micro"].value
    assert metrics.keys() >= {"val/user_blind/log_loss", "test/longer/worst_tenth"}
    assert found.Scalars("test/head/accuracy")[0].value == pytest.approx(metrics["test/head/accuracy"])
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (hparams["k"].number_value, hparams["table"].string_value) == (2, "table")


def test_wandb_gets_every_evaluation_and_the_outcome(
    cache: Cache, tmp_path: Path, wandb: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    result, events = train(cache, tmp_path / "run", "wandb", "wandb")
    ((options, log),) = wandb
    assert (options["mode"], options["project"], options["name"]) == ("offline", "palcache", "run")
    assert options["dir"] == tmp_path / "run" / LOGS
    assert [row["head/step"] for row in log.rows if "head/step" in row] == [
        e.row.step for e in events if e.rule == "head"
    ]
    assert log.rows[0]["head/val_loss"] == events[0].row.val_loss
    assert len(log.rows) == len(events)
    assert log.config["k"] == 2
    assert log.summary == final_metrics(result)
    assert log.finished == 1
    assert "user_blind/step" in log.defined


def test_wandb_is_told_where_to_send(
    cache: Cache, tmp_path: Path, wandb: list[tuple[dict[str, Any], FakeRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(cache, tmp_path / "run", "wandb")
    assert (wandb[0][0]["mode"], wandb[0][0]["project"]) == ("online", "mine")


def test_a_log_changes_no_other_file(cache: Cache, tmp_path: Path, wandb: list[tuple[dict[str, Any], FakeRun]]) -> None:
    train(cache, tmp_path / "plain")
    train(cache, tmp_path / "logged", "wandb")
    (tmp_path / "logged" / LOGS).rmdir()
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "logged")
    assert len(wandb) == 1


def test_a_complete_run_is_not_logged_again(
    cache: Cache, tmp_path: Path, wandb: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    train(cache, tmp_path / "run")
    train(cache, tmp_path / "run", "wandb", resume=True)
    assert wandb == []


def test_a_sweep_logs_each_head_that_it_trains(
    cache: Cache, tmp_path: Path, wandb: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    """Heads train together, so a head's curve is told when its run is written; a complete head is not logged again."""
    options: dict[str, Any] = {"device": "cpu", "jobs": 2}
    for grid, new in (("k=2 seed=0:2", 2), ("k=2,3 seed=0:2", 2), ("k=2,3 seed=0:2", 0)):
        before, heads = len(wandb), list[SweepHead]()

        def log(head: SweepHead, heads: list[SweepHead] = heads) -> None:
            assert head.run is not None
            heads.append(head)
            log_run(["wandb"], head.run)

        run_sweep(cache, tmp_path / "sweep", parse_grid(f"p=4 epochs=2 {grid}"), on_head=log, **options)
        assert len(heads) == len(wandb) - before == new
        for head, (started, found) in zip(heads, wandb[before:], strict=True):
            assert started["name"] == head.name
            assert head.run is not None
            assert head.run.fitted is not None
            assert [row["head/val_loss"] for row in found.rows] == [row.val_loss for row in head.run.fitted.history]
            assert found.summary == final_metrics(head.run)
            assert found.finished == 1


def test_a_run_that_breaks_leaves_its_log_and_its_name(
    cache: Cache, tmp_path: Path, wandb: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    path = tmp_path / "run"
    with pytest.raises(NumericsError, match="lower --lr"):
        train(cache, path, "wandb", fit=replace(FIT, lr=1e30))
    (path / LOGS).mkdir(parents=True, exist_ok=True)
    train(cache, path, "wandb")
    assert wandb[-1][1].finished == 1


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        PalcacheError, match=rf"The log {kind} needs a package .*; install it: pip install 'palcache\[{kind}\]'"
    ):
        open_logs([kind], tmp_path)


def test_an_unknown_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Got the log 'mlflow'; expected one of tensorboard, wandb"):
        open_logs(["mlflow"], tmp_path)
