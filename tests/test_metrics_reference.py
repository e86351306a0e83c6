"""Every metric against an independent implementation, and the bootstrap's coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from palcache.metrics import (
    Array,
    bootstrap,
    brier,
    calibration_error,
    correctness,
    fit_temperature,
    log_loss,
    macro,
    sigmoid,
    worst_tenth,
)

N, USERS = 700, 23


@pytest.fixture(scope="module")
def sample() -> tuple[Array, Array, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    random = np.random.Generator(np.random.PCG64(0))
    margins = 2 * random.standard_normal(N)
    y = np.where(random.random(N) < sigmoid(margins), 1.0, -1.0)
    return margins, y, random.integers(USERS, size=N)


def test_against_scikit_learn(sample: tuple[Array, ...]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    margins, y, user = sample
    probability, outcome = 1 / (1 + np.exp(-margins)), (y + 1) / 2
    assert correctness(margins, y).mean() == pytest.approx(metrics.accuracy_score(y, np.sign(margins)))
    assert log_loss(margins, y) == pytest.approx(metrics.log_loss(outcome, probability))
    assert brier(margins, y) == pytest.approx(metrics.brier_score_loss(outcome, probability))
    by_user = [metrics.accuracy_score(y[user == u], np.sign(margins[user == u])) for u in range(USERS)]
    right = correctness(margins, y)
    assert macro(right, user) == pytest.approx(np.mean(by_user))  # type: ignore[arg-type]
    assert worst_tenth(right, user) == pytest.approx(np.mean(sorted(by_user)[:3]))  # type: ignore[arg-type]


def test_calibration_error_against_quantile_bins(sample: tuple[Array, ...]) -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    margins, y, _ = sample
    margins, y = margins[:690], y[:690]  # 15 bins of 46: quantile edges fall between the same rows
    true, told = calibration.calibration_curve((y + 1) / 2, sigmoid(margins), n_bins=15, strategy="quantile")
    assert calibration_error(margins, y) == pytest.approx(float(np.abs(true - told).mean()), abs=2e-3)


def test_temperature_against_a_grid(sample: tuple[Array, ...]) -> None:
    margins, y, _ = sample
    grid = np.exp(np.linspace(np.log(0.2), np.log(5), 20_001))
    losses = [np.mean(np.log1p(np.exp(-y * 3 * margins / t))) for t in grid]
    assert fit_temperature(3 * margins, y) == pytest.approx(float(grid[int(np.argmin(losses))]), rel=1e-3)


def test_bootstrap_intervals_cover() -> None:
    """Users differ in skill and in how often they answer; 95 % intervals hold the population's mean about as often."""
    random = np.random.Generator(np.random.PCG64(1))
    held = {"micro": 0, "macro": 0}
    repeats, users = 400, 60
    for repeat in range(repeats):
        skill = random.beta(4, 2, size=users)  # mean 2/3, independent of the number of answers
        count = random.integers(5, 30, size=users)
        user = np.repeat(np.arange(users), count)
        right = (random.random(len(user)) < skill[user]).astype(np.float64)
        found = bootstrap(right, user, seed=repeat, draws=400)
        for name in held:
            held[name] += found[name].low <= 2 / 3 <= found[name].high
    for name, count_held in held.items():
        assert 0.91 <= count_held / repeats <= 0.98, name
