"""New users on a run: their learning curve, what stands beside it, and how they are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from palcache.cache import Cache
from palcache.checkpoints import load_head
from palcache.errors import InputError, MismatchError
from palcache.evaluation import Evaluation, evaluate_longer, evaluate_margins, predict_margins
from palcache.files import write_bytes, write_json
from palcache.pairs import contradictions
from palcache.reports import draw_curve
from palcache.runs.folders import load_run, read_config
from palcache.runs.opened_tables import OpenedTable, open_table, population_of
from palcache.users.adaptation import MethodName, Population, adapt_users, posteriors_of, refuse_one_prototype
from palcache.users.curves import ROLES, SHOTS, CurvePoint, curve_csv, curve_to_dict, divide, learning_curve
from palcache.users.posteriors import Posteriors, maximum_a_posteriori
from palcache.users.reductions import ReducedComparisons, require_reducible
from palcache.users.regions import credible_regions
from palcache.users.user_files import ADAPTED, UserTable, load_users, save_users

SeenPolicy = Literal["refuse", "drop"]


@final
@dataclass(frozen=True, slots=True)
class AdaptedRun:
    """A learning curve of new users on a run, and what stands beside it.

    Attributes:
        path: the run folder.
        table: name of the new users' table.
        method: how users were adapted.
        draws: orders of the support.
        points: the curve.
        seen: the run's own users on their test comparisons, by the head's own mixtures.
        yardsticks: `user_blind` and `longer` on the new users' query.
        users: new users in the table.
        contradicting: those who preferred both responses of a pair at different times.
        saved: users that were added to the run.
        files: what was written.
        seconds: wall time, reading included.
    """

    path: Path
    table: str
    method: MethodName
    draws: int
    points: tuple[CurvePoint, ...]
    seen: Evaluation
    yardsticks: Mapping[str, Evaluation]
    users: int
    contradicting: int
    saved: int
    files: tuple[Path, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: `curve.<n>.accuracy.micro`, `seen`, `yardsticks.<rule>`, `seconds`."""
        return {
            "run": str(self.path),
            "table": self.table,
            "method": self.method,
            "draws": self.draws,
            "users": self.users,
            "contradicting": self.contradicting,
            "saved": self.saved,
            "curve": dict(curve_to_dict(self.points)),
            "seen": self.seen.to_dict(),
            "yardsticks": {rule: evaluation.to_dict() for rule, evaluation in self.yardsticks.items()},
            "seconds": self.seconds,
        }


def adapt_run(  # noqa: PLR0913 - keyword-only options
    path: Path,
    cache: Cache,
    comparisons: str,
    *,
    method: MethodName = "map",
    shots: Sequence[int] = SHOTS,
    draws: int = 5,
    seed: int = 0,
    seen_users: SeenPolicy = "refuse",
    keep_users: bool = False,
    out: Path | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> AdaptedRun:
    """Adapt a run to new users and return their learning curve; CSV, JSON and picture are written to a folder.

    Args:
        path: the run folder.
        cache: a cache with the texts of the table.
        comparisons: name of a table of the cache, or a file.
        method: how users are adapted.
        shots: numbers of support comparisons, n.
        draws: orders of the support.
        seed: of query, draws and bootstrap.
        seen_users: refuse a table with users of the head, or leave their rows out.
        keep_users: add the users to the run, adapted to all their comparisons (to the support, where the table says
            which is query); the head's own file stays as it is.
        out: the folder; by default `adaptation` in the run.
        device: where.
        on_progress: called with points done and in all.

    Raises:
        InputError: the head is none that users are adapted on, or has one prototype, or the table has no new user.
        MismatchError: a user is one of the head's own, or texts are not in the cache.
    """
    start = time.perf_counter()
    read_config(path)
    head = load_head(path / "head.safetensors")
    require_reducible(head.shape)
    refuse_one_prototype(head.shape.k)
    run = load_run(path)
    opened = _new_users(open_table(path, cache, comparisons, head, device), seen_users)
    population = population_of(path, cache, opened)
    reduced = opened.reduce()
    points = learning_curve(
        reduced,
        opened.comparisons,
        population,
        method=method,
        shots=shots,
        draws=draws,
        seed=seed,
        on_progress=on_progress,
    )
    saved = _keep(path, opened, reduced, population, method, seed) if keep_users else 0
    seen, twice = run.evaluations["test"]["head"], opened.comparisons.users.codes[contradictions(opened.comparisons)]
    result = AdaptedRun(
        path, opened.name, method, draws, points, seen, _yardsticks(path, opened, seed),
        len(opened.comparisons.users.values), len(np.unique(twice)), saved, (), 0.0,
    )  # fmt: skip
    files = _write(result, out or path / "adaptation")
    return replace(result, files=files, seconds=time.perf_counter() - start)


def _write(result: AdaptedRun, folder: Path) -> tuple[Path, ...]:
    stem = folder / f"{result.table}-{result.method}"
    csv, json, picture = (stem.with_name(stem.name + ending) for ending in (".csv", ".json", ".png"))
    write_bytes(csv, curve_csv(result.points))
    write_json(json, {name: value for name, value in result.to_dict().items() if name not in {"run", "seconds"}})
    title = f"{result.table}: {result.method}, {result.draws} draws"
    draw_curve(picture, result.points, seen=result.seen, yardsticks=result.yardsticks, title=title)
    return csv, json, picture


def _new_users(opened: OpenedTable, policy: SeenPolicy) -> OpenedTable:
    """Return the table without users of the head, or refuse it."""
    names: list[str] = opened.comparisons.users.values.to_pylist()
    known = set(opened.head.users)
    seen = np.array([name in known for name in names], bool)
    if not seen.any():
        return opened
    if policy == "refuse":
        raise MismatchError(
            f"The user {names[int(seen.argmax())]!r} of {opened.name} is one of the head's own ({int(seen.sum())} such "
            "users), so nothing would be new; leave them out with --seen-users drop."
        )
    rows = np.flatnonzero(~seen[opened.comparisons.users.codes])
    if not len(rows):
        raise InputError(f"Every user of {opened.name} is one of the head's own; give a table of new users.")
    return opened.take(rows)


def _yardsticks(path: Path, opened: OpenedTable, seed: int) -> dict[str, Evaluation]:
    _, query = divide(opened.comparisons, seed=seed)
    part = opened.take(np.flatnonzero(query))
    blind = load_head(path / "user_blind.safetensors").to(opened.data.device)
    margins = predict_margins(blind, part.data.with_users(blind.users))
    return {
        "user_blind": evaluate_margins(margins, part.comparisons, seed=seed),
        "longer": evaluate_longer(part.comparisons, seed=seed),
    }


def _keep(
    path: Path, opened: OpenedTable, reduced: ReducedComparisons, population: Population, method: MethodName, seed: int
) -> int:
    """Add the users to the run; return how many."""
    column = opened.comparisons.split
    if column is not None and set(ROLES) & set(column.values.to_pylist()):
        support, _ = divide(opened.comparisons, seed=seed)
        reduced = reduced.take(torch.from_numpy(np.flatnonzero(support)).to(reduced.device))
    calibrated = reduced.calibrated(population.noise)
    if method == "map":
        posteriors = maximum_a_posteriori(calibrated, population.prior)
    else:
        posteriors = posteriors_of(reduced, population, adapt_users(reduced, population, method, seed=seed))
    rows = torch.nonzero(reduced.counts)[:, 0]
    users = tuple(reduced.users[i] for i in rows.tolist())
    found = posteriors.take(rows)
    deviation = credible_regions(calibrated, population.prior, posteriors).deviation[rows].cpu()
    cpu = Posteriors(found.mean.cpu(), found.covariance.cpu(), found.temperature)
    prior = population.prior.to(torch.device("cpu"))
    table = UserTable(users, cpu, reduced.counts[rows].cpu(), prior, deviation, population.noise)
    before = load_users(path / ADAPTED, path / "head.safetensors")
    save_users(path / ADAPTED, before.updated(table) if before else table, path / "head.safetensors")
    return len(users)
