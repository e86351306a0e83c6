"""What every number means: accuracy, calibration and intervals as pure functions of margins (float64, numpy).

Definitions: accuracy is the share of comparisons whose margin has the sign of y, and an exactly zero margin, or a tie,
counts one half; macro is the mean over users; intervals are 95 % percentile bootstraps that resample users, because a
user's comparisons are not independent; calibration is of P(response_2 preferred) = sigmoid(margin).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

DRAWS: Final = 1_000
DRAWN_AT_ONCE: Final = 1 << 21
"""Users drawn per step of the bootstrap: bounds its memory to some 50 MiB however many users there are."""
BINS: Final = 15
WORST_SHARE: Final = 0.1


@final
@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; the interval is NaN where there are fewer than two users to resample."""

    value: float
    low: float
    high: float


def correctness(margins: Array, y: npt.NDArray[Any]) -> Array:
    """Return 1 for a margin of the sign of y, 0 for the other sign, 1/2 for a zero margin or a tie, (n,)."""
    return np.asarray((1 + np.sign(margins) * np.sign(y)) / 2, dtype=np.float64)


def user_means(values: Array, user: Codes) -> Array:
    """Return the mean of each user who has a comparison, in order of their codes."""
    count = np.bincount(user)
    return np.asarray(np.bincount(user, values)[count > 0] / count[count > 0], dtype=np.float64)


def macro(values: Array, user: Codes) -> float:
    """Return the mean over users of their means."""
    return float(user_means(values, user).mean())


def worst_tenth(values: Array, user: Codes) -> float:
    """Return the mean over the tenth of the users (at least one) with the lowest means."""
    means = np.sort(user_means(values, user))
    return float(means[: max(1, math.ceil(WORST_SHARE * len(means)))].mean())


def bootstrap(values: Array, user: Codes, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Estimate]:
    """Return micro, macro and worst-tenth means with 95 % intervals that resample whole users.

    Args:
        values: one value per comparison, (n,), for example `correctness`.
        user: the user's code per comparison, (n,).
        seed: of the resampling.
        draws: number of resamples.
    """
    _, user = np.unique(user, return_inverse=True)
    count, total = np.bincount(user).astype(np.float64), np.bincount(user, values)
    u, generator = len(count), np.random.Generator(np.random.PCG64(seed))
    tenth = max(1, math.ceil(WORST_SHARE * u))
    step = max(1, DRAWN_AT_ONCE // u)
    parts = []
    for start in range(0, draws, step):
        drawn = generator.integers(0, u, size=(min(step, draws - start), u))
        means = (total / count)[drawn]
        micro = total[drawn].sum(1) / count[drawn].sum(1)
        parts.append((micro, means.mean(1), np.partition(means, tenth - 1, axis=1)[:, :tenth].mean(1)))
    samples = dict(zip(("micro", "macro", "worst_tenth"), map(np.concatenate, zip(*parts, strict=True)), strict=True))
    points = {"micro": float(values.mean()), "macro": macro(values, user), "worst_tenth": worst_tenth(values, user)}
    out = {}
    for name, sample in samples.items():
        low, high = np.quantile(sample, [0.025, 0.975]) if u > 1 else (math.nan, math.nan)
        out[name] = Estimate(points[name], float(low), float(high))
    return out


def log_loss(margins: Array, y: npt.NDArray[Any]) -> float:
    """Return the mean of -log P(y), in nats; a tie counts one half for each side."""
    return float(np.mean(np.logaddexp(0, margins) - margins * (np.asarray(y, np.float64) + 1) / 2))


def brier(margins: Array, y: npt.NDArray[Any]) -> float:
    """Return the mean squared difference of P(response_2 preferred) and its outcome in {0, 1/2, 1}."""
    return float(np.mean((sigmoid(margins) - (np.asarray(y, np.float64) + 1) / 2) ** 2))


def calibration_error(margins: Array, y: npt.NDArray[Any], *, bins: int = BINS) -> float:
    """Return the expected calibration error over bins of equal mass in P(response_2 preferred)."""
    probability, outcome = sigmoid(margins), (np.asarray(y, np.float64) + 1) / 2
    order = np.argsort(probability, kind="stable")
    gaps = [abs((probability[part] - outcome[part]).sum()) for part in np.array_split(order, bins)]
    return float(sum(gaps) / len(order))


def fit_temperature(margins: Array, y: npt.NDArray[Any]) -> float:
    """Return the temperature T > 0 that minimises the log-loss of margins / T (Guo et al., ICML 2017).

    The loss is convex in 1/T: golden-section search over T in [1/100, 100] on a log scale.
    """
    ratio, low, high = (math.sqrt(5) - 1) / 2, math.log(1e-2), math.log(1e2)
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    losses = [log_loss(margins / math.exp(at), y) for at in inner]
    for _ in range(60):
        if losses[0] <= losses[1]:
            high, inner, losses = inner[1], [inner[1] - ratio * (inner[1] - low), inner[0]], [0.0, losses[0]]
            losses[0] = log_loss(margins / math.exp(inner[0]), y)
        else:
            low, inner, losses = inner[0], [inner[1], inner[0] + ratio * (high - inner[0])], [losses[1], 0.0]
            losses[1] = log_loss(margins / math.exp(inner[1]), y)
    return math.exp((low + high) / 2)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -x)), dtype=np.float64)
