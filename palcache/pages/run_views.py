"""The numbers behind a page about a run: bins, histograms and positions, as plain values ready to be drawn."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, final

import numpy as np

from palcache.checkpoints import HistoryRow, load_head
from palcache.errors import CacheError
from palcache.evaluation import Evaluation
from palcache.files import read_json
from palcache.metrics import BINS, Array, correctness, sigmoid
from palcache.runs.folders import read_config, read_evaluations, require_complete
from palcache.runs.predictions import LONGER, PREDICTIONS, Predictions, load_predictions
from palcache.runs.prototypes import PROTOTYPES, Prototypes, has_prototypes, load_prototypes

MARGIN_BINS: Final = 41
SHOWN_USERS: Final = 1_500
"""Users that a chart shows; of more, evenly many from the lowest to the highest."""
STACKS: Final = 60
Form = Literal["line", "triangle", "projection"]
Row = dict[str, Any]
T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Simplex:
    """Users among the prototypes.

    Attributes:
        form: k = 2 is a line, k = 3 a triangle; more, and free weights, are projected on the two directions in which users
            differ most.
        users: `user`, `group`, `x`, `y` and `mixture` (text) of each.
        corners: `name`, `x`, `y` of each prototype.
        explained: share of the users' variance that a projection shows; None where nothing is lost.
        total: users in all; charts show at most `SHOWN_USERS`.
    """

    form: Form
    users: tuple[Row, ...]
    corners: tuple[Row, ...]
    explained: float | None
    total: int


@final
@dataclass(frozen=True, slots=True)
class RunView:
    """A run, ready to be drawn.

    Attributes:
        name: of its folder.
        config: as the folder has it.
        evaluations: by split and rule.
        history: the evaluations during training.
        best_step: the chosen step.
        users: `user`, `group`, `n`, and accuracy by rule on test, by the head's accuracy; empty for old runs.
        users_total: users with test comparisons.
        reliability: `rule`, `predicted`, `observed`, `n` of bins of equal mass on test; empty for old runs.
        margins: `low`, `high`, `n`, `right`: histogram of the head's margins towards the answer on test.
        simplex: users among the prototypes; None where there is one prototype or none.
        prototypes: what sets them apart; None for old runs and heads without them.
        curves: new users' learning curves as `palcache adapt` left them, by file name.
    """

    name: str
    config: Mapping[str, Any]
    evaluations: Mapping[str, Mapping[str, Evaluation]]
    history: tuple[HistoryRow, ...]
    best_step: int
    users: tuple[Row, ...]
    users_total: int
    reliability: tuple[Row, ...]
    margins: tuple[Row, ...]
    simplex: Simplex | None
    prototypes: Prototypes | None
    curves: Mapping[str, Mapping[str, Any]]


def view_run(path: Path) -> RunView:
    """Read a complete run folder, old ones included, and return what a page shows of it.

    Raises:
        InputError: there is no finished run at `path`.
        CacheError: a file of it is damaged.
    """
    config = read_config(path)
    require_complete(path)
    predictions = load_predictions(path / PREDICTIONS)
    users = user_accuracies(predictions) if predictions else []
    return RunView(
        path.resolve().name,
        config,
        read_evaluations(path),
        read_history(path / "history.csv"),
        int(read_json(path / "metrics.json", "a run's metrics")["best_step"]),
        tuple(_thinned(users)),
        len(users),
        tuple(reliability(predictions)) if predictions else (),
        tuple(margin_histogram(predictions)) if predictions else (),
        _simplex_of(path, predictions),
        load_prototypes(path / PROTOTYPES),
        {file.stem: read_json(file, "a learning curve") for file in sorted(path.glob("adaptation/*.json"))},
    )


def read_history(path: Path) -> tuple[HistoryRow, ...]:
    """Read what `palcache.reports.write_history` wrote.

    Raises:
        CacheError: the file is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        return tuple(HistoryRow(**{**row, "step": int(row["step"])}) for row in rows)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path} cannot be read as a run's history ({type(error).__name__}: {error}).") from error


def user_accuracies(predictions: Predictions) -> list[Row]:
    """Return `user`, `group`, `n` and the accuracy of each rule on test, from the lowest of the head's to the highest."""
    test = predictions.splits["test"]
    count = np.bincount(test.user, minlength=len(predictions.users))
    asked = np.flatnonzero(count)
    means = {
        rule: np.bincount(test.user, correctness(margins, test.y), minlength=len(count))[asked] / count[asked]
        for rule, margins in test.margins.items()
    }
    groups = group_names(predictions)
    rows = [
        {"user": predictions.users[at], "group": groups[at], "n": int(count[at]),
         **{rule: float(values[i]) for rule, values in means.items()}}
        for i, at in enumerate(asked.tolist())
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["head"], row["user"]))


def group_names(predictions: Predictions) -> list[str]:
    """Return the name of each user's group; empty where it is not known."""
    return [predictions.groups[at] if at >= 0 else "" for at in predictions.group.tolist()]


def reliability(predictions: Predictions) -> list[Row]:
    """Return for each rule with probabilities the bins of equal mass that the calibration error is made of, on test."""
    test, rows = predictions.splits["test"], []
    outcome = (test.y.astype(np.float64) + 1) / 2
    for rule, margins in test.margins.items():
        if rule == LONGER:
            continue
        probability = sigmoid(margins)
        for part in np.array_split(np.argsort(probability, kind="stable"), BINS):
            if len(part):
                predicted, observed = float(probability[part].mean()), float(outcome[part].mean())
                rows.append({"rule": rule, "predicted": predicted, "observed": observed, "n": len(part)})
    return rows


def margin_histogram(predictions: Predictions) -> list[Row]:
    """Return a histogram of the head's margins towards the answer on test, ties left out.

    Bins are equally wide, and one begins at zero; the outermost take the hundredth that lies beyond them, and empty ones at
    the ends are left out.
    """
    test = predictions.splits["test"]
    towards = (test.margins["head"] * test.y)[test.y != 0]
    if not len(towards):
        return []
    reach = max(float(np.quantile(np.abs(towards), 0.99)), 1e-12)
    width = 2 * reach / MARGIN_BINS
    first = math.floor(-reach / width)
    at = np.clip(np.floor(towards / width).astype(np.int64), first, -first - 1) - first
    counts = np.bincount(at, minlength=-2 * first)
    filled = np.flatnonzero(counts)
    return [
        {"low": (first + i) * width, "high": (first + i + 1) * width, "n": int(counts[i]), "right": first + i >= 0}
        for i in range(int(filled[0]), int(filled[-1]) + 1)
    ]


def _simplex_of(path: Path, predictions: Predictions | None) -> Simplex | None:
    head = load_head(path / "head.safetensors")
    if head.shape.k < 2 or not has_prototypes(head.shape):
        return None
    groups: dict[str, str] = {}
    if predictions:
        groups = dict(zip(predictions.users, group_names(predictions), strict=True))
    mixtures = head.mixtures.double().cpu().numpy()
    return place_users(head.users, [groups.get(user, "") for user in head.users], mixtures)


def place_users(users: Sequence[str], groups: Sequence[str], mixtures: Array) -> Simplex:
    """Return where users stand among the prototypes.

    Args:
        users: ids.
        groups: names, empty where not known.
        mixtures: weights, (u, k), k at least 2.
    """
    k = mixtures.shape[1]
    shown = np.array(_thinned(np.lexsort((np.arange(len(users)), mixtures[:, 0])).tolist()))
    corners, explained = np.eye(k), None
    inside = bool(np.allclose(mixtures.sum(1), 1, atol=1e-4) and mixtures.min() > -1e-4)  # free weights are not
    forms: dict[int, Form] = {2: "line", 3: "triangle"}
    form: Form = forms.get(k, "projection") if inside else "projection"
    if form == "line":
        points = np.stack([mixtures[shown, 1], _stacked(mixtures[shown, 1])], axis=1)
        ends = np.array([[0.0, 0.0], [1.0, 0.0]])
    elif form == "triangle":
        ends = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
        points = mixtures[shown] @ ends
    else:
        centre = mixtures.mean(0)
        axes, explained = _principal(mixtures - centre)
        points, ends = (mixtures[shown] - centre) @ axes.T, (corners - centre) @ axes.T
    rows = tuple(
        {"user": users[at], "group": groups[at], "x": float(x), "y": float(y),
         "mixture": ", ".join(f"{weight:.2f}" for weight in mixtures[at])}
        for at, (x, y) in zip(shown.tolist(), points.tolist(), strict=True)
    )  # fmt: skip
    names = tuple(
        {"name": f"prototype {j + 1}", "x": float(x), "y": float(y)} for j, (x, y) in enumerate(ends.tolist())
    )
    return Simplex(form, rows, names, explained, len(users))


def _stacked(values: Array) -> Array:
    """Return the height of each dot where dots of about the same value in [0, 1] stand on each other."""
    bins = np.minimum((values * STACKS).astype(np.int64), STACKS - 1)
    height = np.zeros(len(values))
    for at in np.unique(bins):
        inside = np.flatnonzero(bins == at)
        height[inside] = np.arange(len(inside))
    return height


def _principal(centred: Array) -> tuple[Array, float]:
    """Return the two directions of the largest variance, (2, k), and its share; the largest entry of each is positive."""
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    two = axes[:2]
    signs = np.sign(two[np.arange(2), np.abs(two).argmax(1)])
    total = float((size**2).sum())
    return two * signs[:, None], float((size[:2] ** 2).sum()) / total if total else 1.0


def _thinned(rows: Sequence[T]) -> list[T]:
    """Return the rows, or of too many evenly many."""
    if len(rows) <= SHOWN_USERS:
        return list(rows)
    return [rows[at] for at in np.unique(np.linspace(0, len(rows) - 1, SHOWN_USERS).astype(np.int64)).tolist()]
