"""Every number of an evaluation means what `evaluation.md` says; strangers are refused, dropped or scored generically."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead, load_head, save_head
from palcache.comparisons import Comparisons
from palcache.configs import UnknownUsers
from palcache.errors import InputError, MismatchError
from palcache.evaluation import (
    Evaluation,
    evaluate_head,
    evaluate_longer,
    evaluate_margins,
    known_rows,
    predict_margins,
)
from palcache.heads import PalB
from palcache.tensors import PreferenceData, load_preferences
from tests.worlds import Row, make_cache, planted_rows, random_head

USERS = tuple(f"user {i}" for i in range(7))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a planted world of seven users."""
    return make_cache(tmp_path_factory.mktemp("evaluation") / "cache", *planted_rows(per_user=9))


@pytest.fixture(scope="module")
def data(cache: Cache) -> PreferenceData:
    """Return all its comparisons."""
    return load_preferences(cache, cache.comparisons(), device="cpu")


@pytest.fixture(scope="module")
def head() -> TrainedHead:
    """Return a random head of its users."""
    return random_head(USERS, d=10)


def table(rows: list[tuple[str, int]], groups: str | None = None) -> Comparisons:
    """Return comparisons of users and answers, about responses of length 1 (left) and 3 (right)."""
    out: list[Row] = [
        {"user_id": user, "prompt": "p", "response_1": "a", "response_2": "bcd", "y": y} for user, y in rows
    ]
    if groups is not None:
        out = [{**row, "group": group} for row, group in zip(out, groups, strict=True)]
    return Comparisons.from_rows(out, ties="half")


def reference_margins(head: TrainedHead, data: PreferenceData) -> list[float]:
    """Return margins one comparison at a time in float64, users by their ids."""
    assert isinstance(head.shape, PalB)
    parameters = {name: value.double() for name, value in head.parameters.items()}
    mixtures = torch.softmax(parameters["user.logits"] / head.shape.temperature, dim=1)
    out = []
    for row in range(len(data)):
        batch = data.batch(torch.tensor([row]))
        batch = replace(batch, prompts=batch.prompts.double(), responses=batch.responses.double())
        user = data.users[int(batch.user)]
        mixture = mixtures[head.users.index(user)] if user in head.users else mixtures.mean(0)
        out.append(float(head.shape.margins(parameters, batch, mixtures=mixture[None])))
    return out


def test_margins_are_those_of_each_users_own_mixture(head: TrainedHead, data: PreferenceData) -> None:
    margins = predict_margins(head, data)
    assert margins.dtype == np.float64
    np.testing.assert_allclose(margins, reference_margins(head, data), rtol=1e-4, atol=1e-5)


def test_users_are_found_by_id_however_they_are_numbered(head: TrainedHead, data: PreferenceData) -> None:
    turned = data.with_users(sorted(data.users, reverse=True))
    np.testing.assert_array_equal(predict_margins(head, turned), predict_margins(head, data))
    np.testing.assert_array_equal(predict_margins(head, data.with_users(head.users)), predict_margins(head, data))


def test_strangers_have_the_mean_mixture(data: PreferenceData) -> None:
    few = random_head(USERS[2:5], d=10)
    np.testing.assert_allclose(predict_margins(few, data), reference_margins(few, data), rtol=1e-4, atol=1e-5)


def test_no_comparisons_have_no_margins(head: TrainedHead, data: PreferenceData) -> None:
    assert predict_margins(head, data.take(np.empty(0, np.int64))).shape == (0,)


def test_accuracies_by_hand() -> None:
    comparisons = table([("a", 1), ("a", 1), ("a", -1), ("b", 1), ("b", 0)], groups="xxxyy")
    found = evaluate_margins(np.array([2.0, -1.0, 0.0, 3.0, 1.0]), comparisons)
    assert (found.n, found.users, found.ties) == (5, 2, 1)
    assert found.accuracy["micro"].value == (1 + 0 + 0.5 + 1 + 0.5) / 5
    assert found.accuracy["macro"].value == pytest.approx((0.5 + 0.75) / 2)
    assert found.accuracy["worst_tenth"].value == pytest.approx(0.5)
    assert found.groups == {"x": 0.5, "y": 0.75}
    losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(1)), math.log(2), math.log1p(math.exp(-3))]
    tie = (math.log1p(math.exp(1)) + math.log1p(math.exp(-1))) / 2
    assert found.log_loss == pytest.approx((sum(losses) + tie) / 5)
    assert found.temperature is None


def test_a_flipped_margin_is_wrong_where_it_was_right() -> None:
    comparisons = table([("a", 1), ("b", -1), ("b", 1)])
    right = np.array([0.5, -2.0, 7.0])
    assert evaluate_margins(right, comparisons).accuracy["micro"].value == 1
    assert evaluate_margins(-right, comparisons).accuracy["micro"].value == 0


def test_rules_of_thumb_have_no_probabilities() -> None:
    found = evaluate_margins(np.ones(2), table([("a", 1), ("b", -1)]), probabilities=False)
    assert (found.log_loss, found.brier, found.calibration_error) == (None, None, None)
    assert not {"log_loss", "brier", "calibration_error", "temperature", "groups"} & found.to_dict().keys()


def test_the_longer_response_counts_characters_and_not_bytes() -> None:
    rows: list[Row] = [
        {"user_id": "a", "prompt": "p", "response_1": "\u00e9\u00e9\u00e9", "response_2": "abcd", "y": 1},
        {"user_id": "b", "prompt": "p", "response_1": "abcd", "response_2": "xy", "y": -1},
        {"user_id": "b", "prompt": "p", "response_1": "abcd", "response_2": "x", "y": 1},
        {"user_id": "b", "prompt": "p", "response_1": "ab", "response_2": "xy", "y": -1},
    ]
    found = evaluate_longer(Comparisons.from_rows(rows))
    assert found.accuracy["micro"].value == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_the_temperature_is_fitted_on_validation_and_only_there(
    head: TrainedHead, data: PreferenceData, cache: Cache
) -> None:
    comparisons = cache.comparisons().comparisons
    assert evaluate_head(head, data, comparisons).temperature is None
    none = data.take(np.empty(0, np.int64))
    assert evaluate_head(head, data, comparisons, validation=none).temperature is None
    part = data.take(np.arange(30))
    answers = np.sign(predict_margins(head, part)) * np.where(np.arange(30) % 4, 1, -1)  # three of four as predicted
    half = replace(part, y=torch.from_numpy(answers).float())
    found = evaluate_head(head, data, comparisons, validation=half)
    flat = TrainedHead(head.shape, {**head.parameters, "logit_scale": head.parameters["logit_scale"] - 2}, USERS, {})
    again = evaluate_head(flat, data, comparisons, validation=half)
    assert found.temperature is not None
    assert again.temperature is not None
    assert again.temperature == pytest.approx(found.temperature * math.exp(-2), rel=0.02)
    assert again.accuracy == found.accuracy


def test_intervals_are_seeded(head: TrainedHead, data: PreferenceData, cache: Cache) -> None:
    comparisons = cache.comparisons().comparisons
    first, second, other = (evaluate_head(head, data, comparisons, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert first.accuracy["micro"].value == other.accuracy["micro"].value
    assert first.accuracy["micro"] != other.accuracy["micro"]
    assert first.accuracy["micro"].low < first.accuracy["micro"].value < first.accuracy["micro"].high


def test_no_comparisons_are_refused() -> None:
    nothing = table([("a", 1)]).take(np.empty(0, np.int64))
    with pytest.raises(InputError, match=r"There are no comparisons to evaluate; choose another --split"):
        evaluate_margins(np.empty(0), nothing)


@pytest.mark.parametrize("one_user", [False, True])
def test_an_evaluation_comes_back_from_json(*, one_user: bool) -> None:
    comparisons = table([("a", 1), ("a" if one_user else "b", -1)], groups="xy")
    found = evaluate_margins(np.array([0.5, 0.3]), comparisons, temperature=1.5)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    again = Evaluation.from_dict(values)
    assert again.to_dict() == found.to_dict()
    assert (again.n, again.groups, again.temperature) == (2, {"x": 1.0, "y": 0.0}, 1.5)
    assert values["accuracy"]["micro"] == 0.5
    assert (values["accuracy"]["interval"]["micro"] is None) == one_user
    assert math.isnan(again.accuracy["micro"].low) == one_user


def test_known_rows_follow_the_policy() -> None:
    comparisons = table([("a", 1), ("new", 1), ("b", -1), ("new", -1), ("x", 1)])
    assert known_rows(comparisons, ("a", "b"), "generic").tolist() == [0, 1, 2, 3, 4]
    assert known_rows(comparisons, ("a", "b"), "drop").tolist() == [0, 2]
    with pytest.raises(
        MismatchError,
        match=r"does not know the user 'new' \(2 such users, 3 comparisons\).*--unknown-users generic.*--unknown-users drop",
    ):
        known_rows(comparisons, ("a", "b"), "refuse")


@pytest.mark.parametrize("policy", ["refuse", "generic", "drop"])
def test_known_users_pass_every_policy(policy: UnknownUsers) -> None:
    comparisons = table([("a", 1), ("b", -1)])
    assert known_rows(comparisons, ("b", "a", "c"), policy).tolist() == [0, 1]


def test_a_head_on_a_cache_says_the_same_after_a_round_trip(
    head: TrainedHead, data: PreferenceData, tmp_path: Path
) -> None:
    save_head(tmp_path / "head", head)
    np.testing.assert_array_equal(predict_margins(load_head(tmp_path / "head"), data), predict_margins(head, data))
