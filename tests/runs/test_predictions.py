"""Predictions of a run say what its metrics rest on, name their comparisons, and come back as they were written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig
from palcache.errors import CacheError
from palcache.evaluation import evaluate_margins
from palcache.runs.inputs import RunSplit
from palcache.runs.predictions import (
    PREDICTIONS,
    Predictions,
    SplitPredictions,
    load_predictions,
    predict_splits,
    save_predictions,
)
from palcache.runs.trainings import RunResult, train_run
from palcache.tensors import load_preferences
from tests.worlds import Row, make_cache, planted_rows, random_head

ODD = '</script>.user "0"\n'


def grouped(rows: list[Row]) -> list[Row]:
    """Return rows whose users are in two groups, and one of whom has an odd id."""
    groups = {f"user {i}": "ab"[i % 2] for i in range(7)}
    named = [{**row, "group": groups[str(row["user_id"])]} for row in rows]
    return [{**row, "user_id": ODD} if row["user_id"] == "user 0" else row for row in named]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, RunResult]:
    """Return a cache and a run on it."""
    folder = tmp_path_factory.mktemp("predictions")
    rows, encoder = planted_rows()
    cache = make_cache(folder / "cache", grouped(rows), encoder)
    fit = FitConfig(batch_size=64, epochs=2, evaluations=2)
    return cache, train_run(cache, folder / "run", head=HeadConfig(k=2, p=4), config=fit, device="cpu")


def loaded(path: Path) -> Predictions:
    found = load_predictions(path / PREDICTIONS)
    assert found is not None
    return found


def test_the_metrics_follow_from_the_predictions(world: tuple[Cache, RunResult]) -> None:
    cache, run = world
    predictions, stored = loaded(run.path), cache.comparisons()
    assert predictions.table == stored.fingerprint
    assert list(predictions.splits) == ["test", "val"]
    for name, split in predictions.splits.items():
        part = stored.comparisons.take(split.rows)
        assert part.split is not None
        assert set(part.split.to_list()) == {name}
        assert [predictions.users[at] for at in split.user] == part.users.to_list()
        np.testing.assert_array_equal(split.y, part.y)
        assert list(split.margins) == ["head", "user_blind", "longer"]
        for rule, margins in split.margins.items():
            before = run.evaluations[name][rule]
            again = evaluate_margins(margins, part, probabilities=rule != "longer", temperature=before.temperature)
            assert again == before


def test_users_have_the_groups_of_the_table(world: tuple[Cache, RunResult]) -> None:
    predictions = loaded(world[1].path)
    assert ODD in predictions.users
    groups = {user: predictions.groups[at] for user, at in zip(predictions.users, predictions.group, strict=True)}
    assert groups == {user: "a" if user == ODD else "ab"[int(user[-1]) % 2] for user in predictions.users}


def test_users_whom_the_head_does_not_know_stand_behind_its_own(world: tuple[Cache, RunResult]) -> None:
    stored = world[0].comparisons()
    data = load_preferences(world[0], stored, device="cpu")
    head = random_head(["user 3", "user 1"], d=data.width)
    rows = np.flatnonzero(stored.comparisons.y > 0)
    split = RunSplit(stored.comparisons.take(rows), data.take(rows), rows)
    found = predict_splits({"head": head}, {"train": split, "all": split})
    assert list(found.splits) == ["all"]
    assert found.users[:2] == ("user 3", "user 1")
    assert sorted(found.users) == sorted({stored.comparisons.users.to_list()[row] for row in rows})
    assert [found.users[at] for at in found.splits["all"].user] == stored.comparisons.take(rows).users.to_list()


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    margins = {"longer": np.array([3.0, -1e6]), "head": np.array([0.1, 2.5]).astype(np.float32).astype(np.float64)}
    split = SplitPredictions(np.array([4, 2**40]), np.array([1, 0]), np.array([-1, 1], np.int8), margins)
    before = Predictions("0f", ("ü.", ODD), np.array([-1, 0]), ("g",), {"val": split})
    for name in "ab":
        save_predictions(tmp_path / name, before)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    after = load_predictions(tmp_path / "a")
    assert after is not None
    assert (after.table, after.users, after.groups, after.group.tolist()) == ("0f", before.users, ("g",), [-1, 0])
    assert list(after.splits["val"].margins) == ["longer", "head"]
    for name in ("rows", "user", "y"):
        np.testing.assert_array_equal(getattr(after.splits["val"], name), getattr(split, name))
    for rule, values in margins.items():
        np.testing.assert_array_equal(after.splits["val"].margins[rule], values)


def test_a_run_without_predictions_has_none(tmp_path: Path) -> None:
    assert load_predictions(tmp_path / PREDICTIONS) is None


def test_damaged_predictions_are_refused(world: tuple[Cache, RunResult], tmp_path: Path) -> None:
    path = tmp_path / PREDICTIONS
    content = (world[1].path / PREDICTIONS).read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(CacheError, match=r"cannot be read as a run's predictions .*; train the head again"):
        load_predictions(path)
    path.write_bytes(content.replace(b"palcache-predictions", b"palcache-foretelling"))
    with pytest.raises(
        CacheError, match="is of format palcache-foretelling version 1; expected palcache-predictions 1"
    ):
        load_predictions(path)
    found = loaded(world[1].path)
    uneven = replace(found.splits["val"], y=found.splits["val"].y[1:])
    save_predictions(path, replace(found, splits={"val": uneven}))
    with pytest.raises(CacheError, match="the columns of the split val are not equally long"):
        load_predictions(path)
