"""Learning curves of new users: accuracy against the number of support comparisons, by one protocol.

A user's comparisons are divided once into query and support; each draw orders the support anew and takes its first n.
The query is the same for every n and draw, so that points differ by what was learned alone. n = 0 is the population's own
mixture. A user with fewer support comparisons than n is left out of that n, so each point also says what the same users'
comparisons score without adaptation. Intervals resample users (`palcache.metrics.bootstrap`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.comparisons import Comparisons
from palcache.errors import InputError
from palcache.evaluation import Evaluation
from palcache.metrics import Array, Estimate, bootstrap, brier, calibration_error, correctness, log_loss
from palcache.users.adaptation import MethodName, Population, adapt_users, refuse_one_prototype
from palcache.users.reductions import ReducedComparisons

SHOTS: Final = (0, 1, 2, 5, 10, 20, 50, 100)
QUERY: Final = 0.5
"""Share of a user's comparisons that is query, where the table does not say."""
ROLES: Final = ("support", "query")
Mask = npt.NDArray[np.bool_]


@final
@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What users get right after n support comparisons.

    Attributes:
        shots: n.
        evaluation: on the query of the users who have n support comparisons, averaged over draws.
        gain: macro accuracy above n = 0 of the same users, with its interval.
        left_out: users with a query but fewer than n support comparisons.
        majority: accuracy of the largest group; None without groups, or where no group is the largest.
        minority: accuracy of all others.
    """

    shots: int
    evaluation: Evaluation
    gain: Estimate
    left_out: int
    majority: float | None = None
    minority: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the evaluation's, `left_out`, `gain` and the groups."""
        interval = None if np.isnan(self.gain.low) else [self.gain.low, self.gain.high]
        sides = {"majority": self.majority, "minority": self.minority} if self.majority is not None else {}
        gain = {"macro": self.gain.value, "interval": interval}
        return {**self.evaluation.to_dict(), "left_out": self.left_out, "gain": gain, **sides}


def divide(comparisons: Comparisons, *, seed: int = 0) -> tuple[Mask, Mask]:
    """Return which rows are support and which are query, (n,) each.

    A `split` column that says support and query is honoured. Otherwise a seeded draw makes `QUERY` of each user's
    comparisons query, rounded up; the rest is support.

    Raises:
        InputError: the split column has support and no query, or the reverse.
    """
    column = comparisons.split
    names: list[str] = column.values.to_pylist() if column else []
    if column is not None and set(ROLES) & set(names):
        missing = [role for role in ROLES if role not in names]
        if missing:
            raise InputError(
                f"The split column has {', '.join(sorted(names))} and no {missing[0]}; give both support and query, or no "
                "such column."
            )
        support, query = (np.asarray(column.codes == names.index(role)) for role in ROLES)
        return support, query
    user = comparisons.users.codes.astype(np.int64)
    rank = _rank(user, np.random.Generator(np.random.PCG64(seed)).random(len(user)))
    query = rank < np.ceil(QUERY * np.bincount(user))[user]
    return ~query, query


def _rank(user: npt.NDArray[np.int64], keys: Array) -> npt.NDArray[np.int64]:
    """Return the place of each row among its user's rows in order of their keys, (n,)."""
    order = np.lexsort((keys, user))
    counts = np.bincount(user)
    rank = np.empty(len(user), np.int64)
    rank[order] = np.arange(len(user)) - (np.cumsum(counts) - counts)[user[order]]
    return rank


def learning_curve(  # noqa: PLR0913 - keyword-only options
    reduced: ReducedComparisons,
    comparisons: Comparisons,
    population: Population,
    *,
    method: MethodName = "map",
    shots: Sequence[int] = SHOTS,
    draws: int = 5,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[CurvePoint, ...]:
    """Return a point for every n that some user has comparisons for.

    Args:
        reduced: the new users' comparisons.
        comparisons: the same comparisons.
        population: the seen users.
        method: how users are adapted.
        shots: the values of n; 0 is the population's own mixture.
        draws: orders of the support.
        seed: of query, draws and bootstrap.
        on_progress: called with adaptations done and in all.

    Raises:
        InputError: a number is out of range, the head has one prototype, or no user has a query comparison.
    """
    refuse_one_prototype(reduced.k)
    if not shots or min(shots) < 0 or draws < 1:
        raise InputError(f"Got shots {tuple(shots)} and {draws} draws; expected numbers from 0 and at least one draw.")
    protocol = _Protocol.prepare(reduced, comparisons, population, seed)
    wanted = sorted(set(shots))
    points = []
    for i, n in enumerate(wanted):
        points.append(protocol.point(n, method, draws))
        if on_progress:
            on_progress(i + 1, len(wanted))
    return tuple(point for point in points if point is not None)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Protocol:
    """What the points of a curve share: who is asked what.

    Attributes:
        reduced: the comparisons.
        comparisons: the same comparisons.
        population: the seen users.
        support: which rows may adapt.
        query: which rows are scored.
        generic: margins under the population's mixture, (n,).
        seed: of draws and bootstrap.
    """

    reduced: ReducedComparisons
    comparisons: Comparisons
    population: Population
    support: Mask
    query: Mask
    generic: Array
    seed: int

    @classmethod
    def prepare(
        cls, reduced: ReducedComparisons, comparisons: Comparisons, population: Population, seed: int
    ) -> _Protocol:
        support, query = divide(comparisons, seed=seed)
        if not query.any():
            raise InputError("No user has a comparison to be scored; give each at least one query comparison.")
        generic = reduced.margins(population.generic.expand(len(reduced.users), -1)).cpu().numpy()
        return cls(reduced, comparisons, population, support, query, generic, seed)

    @property
    def user(self) -> npt.NDArray[np.int64]:
        return self.comparisons.users.codes.astype(np.int64)

    def point(self, shots: int, method: MethodName, draws: int) -> CurvePoint | None:
        """Return the point at n = shots, or None where no user has as many."""
        user, total = self.user, len(self.reduced.users)
        asked = np.bincount(user[self.query], minlength=total) > 0
        enough = asked & (np.bincount(user[self.support], minlength=total) >= shots)
        rows = np.flatnonzero(self.query & enough[user])
        if not len(rows):
            return None
        if shots == 0:
            margins = [self.generic[rows]]
        else:
            margins = [self._margins(shots, method, draw, enough, rows) for draw in range(draws)]
        evaluation, right = self._evaluate(margins, rows)
        before = correctness(self.generic[rows], self.comparisons.y[rows])
        gain = bootstrap(right - before, user[rows], seed=self.seed)["macro"]
        return CurvePoint(shots, evaluation, gain, int((asked & ~enough).sum()), *self._sides(right, rows))

    def _margins(self, shots: int, method: MethodName, draw: int, enough: Mask, rows: npt.NDArray[np.int64]) -> Array:
        """Return the margins of query rows after adapting to the first comparisons of a draw."""
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, draw])))
        keys = np.where(self.support, random.random(len(self.support)), 2.0)  # the support stands first
        chosen = self.support & (_rank(self.user, keys) < shots) & enough[self.user]
        device = self.reduced.device
        support = self.reduced.take(torch.from_numpy(np.flatnonzero(chosen)).to(device))
        mixtures = adapt_users(support, self.population, method, seed=self.seed + draw)
        query = self.reduced.take(torch.from_numpy(rows).to(device))
        return np.asarray(query.margins(mixtures).cpu().numpy(), np.float64)

    def _evaluate(self, margins: Sequence[Array], rows: npt.NDArray[np.int64]) -> tuple[Evaluation, Array]:
        """Return the evaluation averaged over draws, and each row's share of draws that were right."""
        y, user, part = self.comparisons.y[rows], self.user[rows], self.comparisons.take(rows)
        right = np.mean([correctness(values, y) for values in margins], axis=0)
        groups = part.group
        evaluation = Evaluation(
            n=len(rows),
            users=len(np.unique(user)),
            ties=int((y == 0).sum()),
            accuracy=bootstrap(right, user, seed=self.seed),
            log_loss=float(np.mean([log_loss(values, y) for values in margins])),
            brier=float(np.mean([brier(values, y) for values in margins])),
            calibration_error=float(np.mean([calibration_error(values, y) for values in margins])),
            temperature=self.population.noise,
            groups={} if groups is None else {
                name: float(right[groups.codes == code].mean()) for code, name in enumerate(groups.values.to_pylist())
            },
        )  # fmt: skip
        return evaluation, right

    def _sides(self, right: Array, rows: npt.NDArray[np.int64]) -> tuple[float | None, float | None]:
        """Return the accuracy of the group with the most users and that of all others."""
        group = self.comparisons.group
        if group is None:
            return None, None
        of_user = np.unique(np.stack([self.user[rows], group.codes[rows]]), axis=1)[1]
        sizes = np.bincount(of_user, minlength=len(group.values))
        if (sizes == sizes.max()).sum() != 1 or (sizes > 0).sum() < 2:
            return None, None
        largest = group.codes[rows] == sizes.argmax()
        return float(right[largest].mean()), float(right[~largest].mean())


def curve_csv(points: Sequence[CurvePoint]) -> bytes:
    """Return a curve as CSV, a row per point."""
    names = ("shots", "users", "left_out", "comparisons", "micro", "micro_low", "micro_high", "macro", "macro_low",
             "macro_high", "worst_tenth", "gain", "gain_low", "gain_high", "log_loss", "brier", "calibration_error",
             "majority", "minority")  # fmt: skip
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for point in points:
        evaluation = point.evaluation
        micro, macro = evaluation.accuracy["micro"], evaluation.accuracy["macro"]
        figures = (
            [point.shots, evaluation.users, point.left_out, evaluation.n, micro.value, micro.low, micro.high,
             macro.value, macro.low, macro.high, evaluation.accuracy["worst_tenth"].value, point.gain.value,
             point.gain.low, point.gain.high, evaluation.log_loss, evaluation.brier, evaluation.calibration_error,
             point.majority, point.minority]
        )  # fmt: skip
        writer.writerow("" if isinstance(value, float) and math.isnan(value) else value for value in figures)
    return buffer.getvalue().encode()


def curve_to_dict(points: Sequence[CurvePoint]) -> Mapping[str, Any]:
    """Return a curve as JSON values by n."""
    return {str(point.shots): point.to_dict() for point in points}
