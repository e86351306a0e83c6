"""Every number against scikit-learn or slow plain Python, and the intervals against their promise."""

from __future__ import annotations

import math
import tracemalloc
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

import palcache.metrics
from palcache.metrics import (
    bootstrap,
    brier,
    calibration_error,
    correctness,
    fit_temperature,
    log_loss,
    macro,
    sigmoid,
    user_means,
    worst_tenth,
)

Array = npt.NDArray[np.float64]
VALUES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 13)), min_size=1, max_size=40)


def drawn(n: int, seed: int = 0, scale: float = 1.5) -> tuple[Array, npt.NDArray[np.int8]]:
    """Return margins, and answers that follow them."""
    generator = np.random.default_rng(seed)
    margins = generator.normal(0, scale, n)
    y = np.where(generator.random(n) < sigmoid(margins), 1, -1)
    return margins, y.astype(np.int8)


def means_by_hand(values: list[float], user: list[int]) -> dict[int, float]:
    found = defaultdict(list)
    for value, name in zip(values, user, strict=True):
        found[name].append(value)
    return {name: sum(own) / len(own) for name, own in sorted(found.items())}


def test_correctness_counts_zero_margins_and_ties_one_half() -> None:
    margins = np.array([2.0, -2.0, 2.0, -2.0, 0.0, -0.0, 3.0, -3.0, 0.0, 1e-300])
    y = np.array([1, -1, -1, 1, 1, -1, 0, 0, 0, 1], np.int8)
    assert correctness(margins, y).tolist() == [1, 1, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 1]


def test_correctness_is_accuracy() -> None:
    margins, y = drawn(997)
    assert correctness(margins, y).mean() == pytest.approx(accuracy_score(y, np.sign(margins)), abs=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.5, 8.0])
def test_log_loss_and_brier_are_scikit_learns(scale: float) -> None:
    margins, y = drawn(613, scale=scale)
    p = 1 / (1 + np.exp(-margins))
    assert log_loss(margins, y) == pytest.approx(sklearn_log_loss(y, p, labels=[-1, 1]), rel=1e-10)
    assert brier(margins, y) == pytest.approx(brier_score_loss(y, p, pos_label=1), rel=1e-10)


def test_a_tie_is_half_of_each_answer() -> None:
    margins, _ = drawn(211)
    ones = np.ones(211, np.int8)
    assert log_loss(margins, 0 * ones) == pytest.approx((log_loss(margins, ones) + log_loss(margins, -ones)) / 2)
    p = sigmoid(margins)
    assert brier(margins, 0 * ones) == pytest.approx(np.mean((p - 0.5) ** 2))
    assert log_loss(np.zeros(3), 0 * ones[:3]) == pytest.approx(math.log(2))


def test_large_margins_do_not_overflow() -> None:
    margins, y = np.array([800.0, -800.0, 800.0]), np.array([1, -1, -1], np.int8)
    with np.errstate(all="raise", under="ignore"):
        assert log_loss(margins, y) == pytest.approx(800 / 3)
        assert brier(margins, y) == pytest.approx(1 / 3)
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_losses_do_not_overflow_in_small_integers() -> None:
    """Answers are int8, and 127 + 1 is -128 there."""
    margins, y = drawn(5)
    for measure in (log_loss, brier, calibration_error):
        assert measure(margins, y) == measure(margins, y.astype(np.float64))


def calibration_by_hand(margins: Array, y: npt.NDArray[Any], bins: int) -> float:
    """Sort by probability, cut into bins whose sizes differ by at most one, and weigh the gaps."""
    pairs = sorted((1 / (1 + math.exp(-m)), (int(answer) + 1) / 2) for m, answer in zip(margins, y, strict=True))
    n, start, error = len(pairs), 0, 0.0
    for b in range(bins):
        size = n // bins + (1 if b < n % bins else 0)
        part = pairs[start : start + size]
        start += size
        gap = sum(p for p, _ in part) / size - sum(outcome for _, outcome in part) / size
        error += abs(gap) * size / n
    return error


@pytest.mark.parametrize(("n", "bins"), [(15, 15), (16, 15), (151, 15), (1_000, 7), (29, 3)])
def test_calibration_error_has_bins_of_equal_mass(n: int, bins: int) -> None:
    margins, y = drawn(n, seed=n)
    y[: n // 5] = 0
    assert calibration_error(margins, y, bins=bins) == pytest.approx(calibration_by_hand(margins, y, bins), abs=1e-12)


def test_calibration_error_has_fifteen_bins_and_fewer_where_there_are_fewer_rows() -> None:
    margins, y = drawn(151)
    assert (
        calibration_error(margins, y)
        == calibration_error(margins, y, bins=15)
        != calibration_error(margins, y, bins=14)
    )
    assert calibration_error(margins[:4], y[:4]) == calibration_error(margins[:4], y[:4], bins=4)


def test_calibration_error_tells_calibrated_from_overconfident() -> None:
    margins, y = drawn(40_000)
    assert calibration_error(margins, y) < 0.015
    assert calibration_error(3 * margins, y) > 0.1


@settings(deadline=None, max_examples=100)
@given(VALUES)
def test_means_of_users_macro_and_worst_tenth(pairs: list[tuple[float, int]]) -> None:
    values, user = [value for value, _ in pairs], [name for _, name in pairs]
    means = list(means_by_hand(values, user).values())
    worst = sorted(means)[: max(1, math.ceil(len(means) / 10))]
    arrays = np.array(values), np.array(user)
    assert user_means(*arrays).tolist() == pytest.approx(means)
    assert macro(*arrays) == pytest.approx(sum(means) / len(means))
    assert worst_tenth(*arrays) == pytest.approx(sum(worst) / len(worst))


@pytest.mark.parametrize(("users", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (30, 3), (70, 7), (101, 11)])
def test_the_worst_tenth_is_rounded_up(users: int, worst: int) -> None:
    values = np.arange(users, dtype=np.float64)
    assert worst_tenth(values, np.arange(users)) == pytest.approx(np.mean(values[:worst]))


def test_bootstrap_points_are_the_measures() -> None:
    generator = np.random.default_rng(0)
    values, user = generator.random(301), generator.integers(0, 23, 301) * 5
    found = bootstrap(values, user)
    assert found["micro"].value == pytest.approx(values.mean())
    assert found["macro"].value == pytest.approx(macro(values, user))
    assert found["worst_tenth"].value == pytest.approx(worst_tenth(values, user))
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high
    assert len({(estimate.low, estimate.high) for estimate in found.values()}) == 3


def test_bootstrap_is_the_percentiles_of_resampled_users() -> None:
    """Slow oracle: copy the rows of drawn users, and measure."""
    generator = np.random.default_rng(1)
    user = generator.integers(0, 12, 67)
    values = generator.random(67)
    names = np.unique(user)
    picks = np.random.Generator(np.random.PCG64(7)).integers(0, len(names), size=(53, len(names)))
    samples = defaultdict(list)
    for pick in picks:
        rows = [np.flatnonzero(user == names[i]) for i in pick]
        again = np.concatenate([np.full(len(part), i) for i, part in enumerate(rows)])
        copied = values[np.concatenate(rows)]
        samples["micro"].append(copied.mean())
        samples["macro"].append(macro(copied, again))
        samples["worst_tenth"].append(worst_tenth(copied, again))
    found = bootstrap(values, user, seed=7, draws=53)
    for name, sample in samples.items():
        expected = np.quantile(sample, [0.025, 0.975])
        assert [found[name].low, found[name].high] == pytest.approx(expected, abs=1e-12)


def test_bootstrap_depends_on_the_seed_alone_and_not_on_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    values, user = generator.random(211), generator.integers(0, 17, 211)
    first = bootstrap(values, user, seed=3)
    assert bootstrap(values, user, seed=3) == first != bootstrap(values, user, seed=4)
    monkeypatch.setattr(palcache.metrics, "DRAWN_AT_ONCE", 5 * 17)
    assert bootstrap(values, user, seed=3) == first


def test_the_memory_of_the_bootstrap_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws of 2,000 users at once would take 16 MB for each of several arrays."""
    monkeypatch.setattr(palcache.metrics, "DRAWN_AT_ONCE", 20_000)
    tracemalloc.start()
    try:
        bootstrap(np.ones(2_000), np.arange(2_000))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_one_user_has_no_interval() -> None:
    for estimate in bootstrap(np.array([1.0, 0.0, 1.0]), np.array([4, 4, 4])).values():
        assert estimate.value == pytest.approx(2 / 3)
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)


def coverage(measure: str, *, by_user: bool, simulations: int = 400) -> float:
    """Return how often the interval holds the true mean, when users differ: 60 users with 5 to 40 answers each."""
    truth, hits = 0.7, 0
    for seed in range(simulations):
        generator = np.random.default_rng([seed, 17])
        skill = generator.beta(7, 3, 60)  # its mean is the truth
        user = np.repeat(np.arange(60), generator.integers(5, 41, 60))
        values = (generator.random(len(user)) < skill[user]).astype(np.float64)
        clusters = user if by_user else np.arange(len(user))
        estimate = bootstrap(values, clusters, seed=seed, draws=200)[measure]
        hits += estimate.low <= truth <= estimate.high
    return hits / simulations


@pytest.mark.parametrize("measure", ["micro", "macro"])
def test_intervals_hold_the_truth_in_95_percent(measure: str) -> None:
    """Four standard errors of 400 simulations are 4.4 points; percentile intervals of 60 users lose about one."""
    assert 0.90 <= coverage(measure, by_user=True) <= 0.985


def test_intervals_that_resample_comparisons_are_too_narrow() -> None:
    """The negative control: a user's answers are not independent."""
    assert coverage("micro", by_user=False, simulations=100) < 0.85


@pytest.mark.parametrize(("scale", "ties"), [(0.2, 0), (1.0, 0), (4.0, 60), (25.0, 0)])
def test_the_temperature_beats_a_dense_grid(scale: float, ties: int) -> None:
    margins, y = drawn(1_501, seed=2, scale=1.0)
    margins, y = margins * scale, y.copy()
    y[:ties] = 0
    found = fit_temperature(margins, y)
    grid = np.exp(np.linspace(math.log(1e-2), math.log(1e2), 4_001))
    losses = [log_loss(margins / t, y) for t in grid]
    assert log_loss(margins / found, y) <= min(losses) + 1e-12
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)
    assert 0.7 * scale < found < 1.6 * scale


def test_the_temperature_undoes_a_scale() -> None:
    margins, y = drawn(2_003)
    assert fit_temperature(7 * margins, y) == pytest.approx(7 * fit_temperature(margins, y), rel=1e-5)


def test_the_temperature_stays_in_its_range() -> None:
    margins, y = drawn(101)
    assert fit_temperature(np.abs(margins) * y, y) == pytest.approx(1e-2, rel=1e-6)
    assert fit_temperature(-np.abs(margins) * y, y) == pytest.approx(1e2, rel=1e-6)


@given(st.lists(st.floats(-700, 700), min_size=1, max_size=9))
def test_sigmoid(values: list[float]) -> None:
    assert sigmoid(np.array(values)) == pytest.approx([1 / (1 + math.exp(-value)) for value in values], rel=1e-12)
