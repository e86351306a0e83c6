"""A run folder is reproducible to the byte, resumable, refused where it does not belong, and evaluated as it was trained."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import palcache
from palcache import tensors
from palcache.cache import Cache
from palcache.checkpoints import load_head
from palcache.configs import FitConfig, HeadConfig, UnknownUsers
from palcache.errors import CacheError, InputError, MismatchError, NumericsError
from palcache.heads import PalB
from palcache.runs import trainings as runs
from palcache.runs.trainings import evaluate_run, load_run, train_run
from palcache.training import FitProgress
from tests.worlds import (
    PLANTED_FIT,
    PLANTED_HEAD,
    Interrupter,
    Interruption,
    KnownVectors,
    Row,
    files_of,
    make_cache,
    planted_rows,
)

HEAD = HeadConfig(k=3, p=4, projector="mlp1-relu-dropout1")
FIT = FitConfig(batch_size=64, epochs=6, evaluations=6, lr=0.01, patience=0)
FILES = {"config.json", "head.safetensors", "users.safetensors", "user_blind.safetensors", "history.csv", "metrics.json",
         "curves.png", "predictions.safetensors", "prototypes.json"}  # fmt: skip
World = tuple[list[Row], KnownVectors]


@pytest.fixture(scope="module")
def world() -> World:
    """Return a planted world of seven users."""
    return planted_rows()


@pytest.fixture(scope="module")
def cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return its cache."""
    return make_cache(tmp_path_factory.mktemp("runs") / "cache", *world)


@pytest.fixture(scope="module")
def done(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run, not to be changed."""
    return train(cache, tmp_path_factory.mktemp("done") / "run").path


def train(cache: Cache, path: Path, **options: Any) -> runs.RunResult:
    return train_run(cache, path, **{"head": HEAD, "config": FIT, "device": "cpu", **options})


def remade(tmp_path: Path, world: World, change: Callable[[int, Row], Row | None]) -> Cache:
    """Return a cache of the world's rows after a change; None leaves a row out."""
    rows = [changed for at, row in enumerate(world[0]) if (changed := change(at, row)) is not None]
    return make_cache(tmp_path / "changed", rows, world[1])


def test_a_run_leaves_its_files_and_nothing_else(done: Path) -> None:
    assert set(files_of(done)) == FILES
    config = json.loads((done / "config.json").read_bytes())
    assert (config["format"], config["version"]) == ("palcache-run", 1)
    assert config["versions"]["palcache"] == palcache.__version__
    assert config["head"] == HEAD.to_dict()
    assert config["fit"] == FIT.to_dict()
    assert config["unknown_users"] == "refuse"
    rows = list(csv.DictReader((done / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 30]
    head = load_head(done / "head.safetensors")
    assert head.users == tuple(f"user {i}" for i in range(7))
    assert head.about == {key: config[key] for key in ("table", "spaces", "encoder", "head", "fit", "unknown_users")}
    assert isinstance(head.shape, PalB)
    assert load_head(done / "user_blind.safetensors").shape == replace(head.shape, k=1)


def test_metrics_name_splits_rules_and_the_best_step(cache: Cache, done: Path) -> None:
    metrics = json.loads((done / "metrics.json").read_bytes())
    assert metrics.keys() == {"val", "test", "yardsticks", "best_step", "stopped_early"}
    assert metrics["yardsticks"].keys() == {"user_blind", "longer"}
    column = cache.comparisons().comparisons.split
    assert column is not None
    splits = column.to_list()
    for split in ("val", "test"):
        for values in (metrics[split], *(rule[split] for rule in metrics["yardsticks"].values())):
            assert values["n"] == splits.count(split)
            assert 0 <= values["accuracy"]["worst_tenth"] <= values["accuracy"]["macro"] <= 1
    rows = list(csv.DictReader((done / "history.csv").open()))
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert metrics["best_step"] == int(best["step"])
    assert metrics["val"]["accuracy"]["micro"] == pytest.approx(float(best["val_accuracy"]))
    assert metrics["val"]["log_loss"] == pytest.approx(float(best["val_loss"]), rel=1e-5)


def test_the_same_seed_gives_the_same_bytes_in_every_file(cache: Cache, done: Path, tmp_path: Path) -> None:
    train(cache, tmp_path / "run")
    assert files_of(tmp_path / "run") == files_of(done)


def test_another_seed_gives_another_head(cache: Cache, done: Path, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", config=replace(FIT, seed=1))
    for name in ("head.safetensors", "history.csv", "metrics.json", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() != (done / name).read_bytes()


@pytest.mark.parametrize("stops", [(1,), (3, 2), (2, 1, 1), (6,), (8,), (12, 4)])
def test_stopped_runs_end_with_the_same_bytes(
    cache: Cache, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: Sequence[int]
) -> None:
    """Six evaluations of the head are followed by six of the yardstick; the state is kept after each of the head's."""
    monkeypatch.setattr(runs, "STATE_SECONDS", 0)
    path = tmp_path / "run"
    for turn, stop in enumerate(stops):
        with pytest.raises(Interruption):
            train(cache, path, resume=turn > 0, on_progress=Interrupter(stop))
        assert "metrics.json" not in files_of(path)
        assert "state.safetensors" in files_of(path)
    result = train(cache, path, resume=True)
    assert files_of(path) == files_of(done)
    assert result.fitted is not None
    assert len(result.fitted.history) == 6


def test_a_resumed_run_does_not_repeat_what_it_kept(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "STATE_SECONDS", 0)
    with pytest.raises(Interruption):
        train(cache, tmp_path / "run", on_progress=Interrupter(4))
    events: list[FitProgress] = []
    train(cache, tmp_path / "run", resume=True, on_progress=events.append)
    assert [event.row.step for event in events if event.rule == "head"] == [25, 30]
    assert [event.row.step for event in events if event.rule == "user_blind"] == [5, 10, 15, 20, 25, 30]


def test_a_run_stopped_before_its_first_state_starts_anew(cache: Cache, done: Path, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        train(cache, tmp_path / "run", on_progress=Interrupter(3))
    assert set(files_of(tmp_path / "run")) == {"config.json"}
    train(cache, tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run") == files_of(done)


def test_a_broken_state_starts_anew(cache: Cache, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "STATE_SECONDS", 0)
    with pytest.raises(Interruption):
        train(cache, tmp_path / "run", on_progress=Interrupter(2))
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    (tmp_path / "run" / ".state.safetensors.999999999.tmp").write_bytes(b"left by a kill")
    train(cache, tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run") == files_of(done)


def test_resuming_a_finished_run_trains_nothing(cache: Cache, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.iterdir()}
    result = train(cache, done, resume=True, on_progress=Interrupter(1))
    assert (result.fitted, result.seconds) == (None, 0.0)
    assert {path: path.stat().st_mtime_ns for path in done.iterdir()} == before


def test_an_existing_run_is_refused_without_resume(cache: Cache, done: Path) -> None:
    with pytest.raises(
        InputError, match=r"The run .* exists; name a new folder with --run, or continue it with --resume"
    ):
        train(cache, done)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": replace(HEAD, k=2)}, r"it has head\.k = 3, asked now: 2\. Give the same options"),
        ({"config": replace(FIT, lr=0.02, seed=4)}, r"fit\.lr = 0\.01, asked now: 0\.02; fit\.seed = 0, asked now: 4"),
        ({"unknown_users": "drop"}, r"unknown_users = refuse, asked now: drop"),
    ],
)
def test_resuming_with_other_options_is_refused(
    cache: Cache, done: Path, options: dict[str, Any], message: str
) -> None:
    before = files_of(done)
    with pytest.raises(MismatchError, match=message):
        train(cache, done, resume=True, **options)
    assert files_of(done) == before


def test_resuming_on_another_table_is_refused(world: World, done: Path, tmp_path: Path) -> None:
    other = remade(tmp_path, world, lambda at, row: None if at == 5 else row)
    with pytest.raises(MismatchError, match=r"table\.fingerprint = \w+, asked now: \w+"):
        train(other, done, resume=True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_that_is_no_run_is_refused(cache: Cache, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"exists and is no run folder; name a new one with --run"):
        train(cache, path, resume=True)
    assert [found.read_text() for found in tmp_path.rglob("*") if found.is_file()] == ["mine"]


def test_an_empty_folder_is_as_good_as_none(cache: Cache, done: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    train(cache, tmp_path / "run")
    assert files_of(tmp_path / "run") == files_of(done)


@pytest.mark.parametrize(
    "options", [{"head": replace(HEAD, projector="identity")}, {"comparisons": "nothing"}, {"device": "abacus"}]
)
def test_refused_options_leave_no_folder(cache: Cache, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"identity needs d = p|no comparison table nothing|expected auto, cpu"):
        train(cache, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_breaks_at_once_leaves_no_folder(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="lower --lr"):
        train(cache, tmp_path / "run", config=replace(FIT, lr=1e30))
    assert not (tmp_path / "run").exists()
    train(cache, tmp_path / "run")


def test_k_1_is_its_own_yardstick(cache: Cache, tmp_path: Path) -> None:
    result = train(cache, tmp_path / "run", head=replace(HEAD, k=1))
    files = files_of(tmp_path / "run")
    assert files["head.safetensors"] == files["user_blind.safetensors"]
    assert result.evaluations["test"]["head"] == result.evaluations["test"]["user_blind"]


def test_planted_tastes_beat_the_user_blind_yardstick(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", *planted_rows(users=20, per_user=250))
    result = train(cache, tmp_path / "run", head=PLANTED_HEAD, config=replace(PLANTED_FIT, epochs=16, lr=0.02))
    micro = {rule: found.accuracy["micro"] for rule, found in result.evaluations["test"].items()}
    assert micro["head"].low > micro["user_blind"].high > micro["user_blind"].value > micro["longer"].value
    assert micro["head"].value > 0.85


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_split_is_refused(world: World, tmp_path: Path, split: str) -> None:
    cache = remade(tmp_path, world, lambda _at, row: None if row["split"] == split else row)
    with pytest.raises(
        InputError, match=rf"The split {split} of the table table is empty \(it has \w+, \w+\); embed it again"
    ):
        train(cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_table_without_splits_is_refused(world: World, tmp_path: Path) -> None:
    cache = remade(tmp_path, world, lambda _at, row: {name: row[name] for name in row if name != "split"})
    with pytest.raises(
        InputError, match=r"The split train of the table table is empty \(it has none\); embed it again"
    ):
        train(cache, tmp_path / "run")


def test_a_single_user_is_refused(world: World, tmp_path: Path) -> None:
    cache = remade(tmp_path, world, lambda _at, row: row if row["user_id"] == "user 2" else None)
    with pytest.raises(InputError, match=r"has one user in its training split \('user 2'\); .* needs two or more"):
        train(cache, tmp_path / "run")


def strangers_in_test(at: int, row: Row) -> Row:
    return {**row, "user_id": f"stranger {at}"} if row["split"] == "test" and at % 2 else row


def test_strangers_are_refused_dropped_or_scored(world: World, tmp_path: Path) -> None:
    cache = remade(tmp_path, world, strangers_in_test)
    column = cache.comparisons().comparisons.split
    assert column is not None
    total = column.to_list().count("test")
    with pytest.raises(MismatchError, match="does not know the user 'stranger"):
        train(cache, tmp_path / "refuse")
    n = {}
    policies: tuple[UnknownUsers, ...] = ("generic", "drop")
    for policy in policies:
        result = train(cache, tmp_path / policy, unknown_users=policy)
        assert len(result.head.users) == 7
        n[policy] = result.evaluations["test"]["head"].n
        assert n[policy] == result.evaluations["test"]["longer"].n
        again = evaluate_run(tmp_path / policy, cache, device="cpu", unknown_users=policy)
        assert again == result.evaluations["test"]
    assert n["generic"] == total > n["drop"] > 0
    with pytest.raises(MismatchError, match="--unknown-users generic"):
        evaluate_run(tmp_path / "drop", cache, device="cpu")


def test_a_split_of_strangers_alone_is_refused(world: World, tmp_path: Path) -> None:
    cache = remade(tmp_path, world, lambda at, row: {**row, "user_id": f"s {at}"} if row["split"] == "val" else row)
    with pytest.raises(InputError, match="No user of the split val of the table table has a training comparison"):
        train(cache, tmp_path / "run", unknown_users="drop")
    assert not (tmp_path / "run").exists()


def test_other_splits_play_no_part(world: World, done: Path, tmp_path: Path) -> None:
    """Support and query rows of new users may stand in the same table."""
    new: list[Row] = [{**row, "user_id": "new", "split": "query"} for row in world[0][:9]]
    other = make_cache(tmp_path / "cache", [*world[0], *new], world[1])
    train(other, tmp_path / "run")
    for name in ("history.csv", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (done / name).read_bytes()
    found = evaluate_run(tmp_path / "run", other, split="query", device="cpu", unknown_users="generic")
    assert (found["head"].n, found["head"].users) == (9, 1)


def test_streamed_training_is_resumable_and_evaluates_alike(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "MEMORY_SHARE", 0)
        patch.setattr(runs, "STATE_SECONDS", 0)
        whole = train(cache, tmp_path / "whole")
        with pytest.raises(Interruption):
            train(cache, tmp_path / "run", on_progress=Interrupter(3))
        train(cache, tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
    assert evaluate_run(tmp_path / "run", cache, device="cpu") == whole.evaluations["test"]


def test_a_run_comes_back_as_it_was_returned(cache: Cache, done: Path, tmp_path: Path) -> None:
    result = train(cache, tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert again.evaluations == result.evaluations
    assert [list(rules) for rules in again.evaluations.values()] == [list(r) for r in result.evaluations.values()]
    assert {**again.to_dict(), "seconds": 0} == {**result.to_dict(), "seconds": 0}
    assert again.head.users == result.head.users
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["test"]["accuracy"]["micro"] == result.evaluations["test"]["head"].accuracy["micro"].value
    assert values["seconds"] > 0
    assert load_run(done).evaluations == result.evaluations


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluating_the_runs_own_table_repeats_its_metrics(cache: Cache, done: Path, split: str) -> None:
    assert evaluate_run(done, cache, split=split, device="cpu") == load_run(done).evaluations[split]


def test_evaluating_all_rows_takes_every_split(cache: Cache, done: Path) -> None:
    found = evaluate_run(done, cache, split=None, device="cpu")
    assert found["head"].n == len(cache.comparisons().comparisons)


def test_evaluating_an_unknown_split_names_the_known_ones(cache: Cache, done: Path) -> None:
    with pytest.raises(
        InputError, match=r"no comparisons in the split query; it has test, train, val: choose one with --split"
    ):
        evaluate_run(done, cache, split="query", device="cpu")


def test_a_run_is_refused_on_vectors_of_another_encoder(world: World, done: Path, tmp_path: Path) -> None:
    rows, encoder = world
    other = make_cache(tmp_path / "other", rows, KnownVectors(encoder.vectors, encoder.width, "another"))
    with pytest.raises(
        MismatchError, match=r"was trained on the vectors of known \(space \w{8}\), and the table table in"
    ):
        evaluate_run(done, other, device="cpu")


def test_a_run_evaluates_on_another_table_of_its_encoder(world: World, done: Path, tmp_path: Path) -> None:
    """Without the run's own validation split there is no temperature."""
    rows, encoder = world
    other = make_cache(tmp_path / "other", rows[::3], encoder, name="third")
    found = evaluate_run(done, other, split=None, device="cpu")
    assert found["head"].n == len(rows[::3])
    assert found["head"].temperature is None
    make_cache(tmp_path / "other", rows[::4], encoder, name="fourth")
    with pytest.raises(InputError, match=r"2 comparison tables \(fourth, third\); choose one with --comparisons"):
        evaluate_run(done, Cache(tmp_path / "other"), split=None, device="cpu")
    assert evaluate_run(done, Cache(tmp_path / "other"), comparisons="fourth", split=None, device="cpu")[
        "head"
    ].n == len(rows[::4])


@pytest.mark.parametrize("read", [load_run, lambda path: evaluate_run(path, Cache(path))])
def test_a_folder_that_is_no_run_cannot_be_read(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = make_cache(tmp_path / "nothing", *planted_rows(per_user=2)).path
    with pytest.raises(
        InputError, match=r"nothing is no run folder \(no config\.json\); make one with palcache train-head"
    ):
        read(path)


def test_an_unfinished_run_says_how_to_go_on(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Interruption):
        train(cache, path, on_progress=Interrupter(7))
    for read in (load_run, lambda found: evaluate_run(found, cache)):
        with pytest.raises(
            InputError, match=r"is not finished; go on with palcache train-head \.\.\. --run .*run --resume"
        ):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json cannot be read"),
        ("config.json", b"[]", r"config\.json is of format None version None; expected palcache-run 1"),
        ("config.json", b'{"format": "palcache-run", "version": 9}', r"version 9; expected palcache-run 1"),
        ("metrics.json", b"{", r"metrics\.json cannot be read"),
        ("metrics.json", b"{}", r"metrics\.json .*damaged"),
        ("head.safetensors", b"", r"head\.safetensors cannot be read as a head"),
    ],
)
def test_a_damaged_run_is_refused(
    cache: Cache, done: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for file, old in files_of(done).items():
        (path / file).write_bytes(content if file == name else old)
    with pytest.raises(CacheError, match=message):
        load_run(path)
    if name != "metrics.json":
        with pytest.raises(CacheError, match=message):
            evaluate_run(path, cache, device="cpu")
