"""Are some runs better than others? Means over seeds, and a paired test that resamples users.

Runs of the same options but for their seeds make a row: mean and sample standard deviation (n - 1; none is rescaled) over
the runs. Whether each comparison is predicted right is averaged over a row's runs, and the row that is right on the largest
share of all comparisons is tested against every other row of the same ones (`palcache.paired_tests`). It counts as best only
if it is ahead of each, interval included, with a p-value, corrected for their number, below the level. Seeds are averaged,
users are resampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from palcache.errors import InputError, did_you_mean
from palcache.evaluation import Evaluation
from palcache.fingerprints import arrays_digest
from palcache.metrics import Array, Codes, Estimate, correctness
from palcache.paired_tests import DRAWS, LEVEL, PairedTest, paired_test
from palcache.runs.folders import RULES
from palcache.runs.predictions import PREDICTIONS
from palcache.runs.records import Options, RunRecord, differing, read_records

METRICS: Final = ("micro", "macro", "worst_tenth", "log_loss", "calibration_error")
FEW_USERS: Final = 20
"""Below this the bootstrap of clusters is known to understate uncertainty."""


@final
@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over runs.

    Attributes:
        mean: over the runs.
        deviation: sample standard deviation (n - 1); None for a single run.
    """

    mean: float
    deviation: float | None


@final
@dataclass(frozen=True, slots=True)
class ContrastRow:
    """Runs of the same options but for their seeds.

    Attributes:
        rule: `head`, `user_blind` or `longer`.
        options: values of the options that rows are grouped by; those that do not concern the rule are missing.
        runs: how many.
        metrics: by name (`METRICS`); those that the rule has not are missing.
        best: the test supports that it is better than every other row of its comparisons.
        behind: accuracy of the tested row less this one's, with its 95 % interval; None where there was no test.
        p: Holm's p-value of that difference.
        paths: the run folders.
    """

    rule: str
    options: Options
    runs: int
    metrics: Mapping[str, Spread]
    best: bool = False
    behind: Estimate | None = None
    p: float | None = None
    paths: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        behind = None if self.behind is None else asdict(self.behind)
        metrics = {name: asdict(spread) for name, spread in self.metrics.items()}
        return {**asdict(self), "metrics": metrics, "behind": behind, "paths": [str(path) for path in self.paths]}


@final
@dataclass(frozen=True, slots=True)
class Contrasts:
    """Runs compared.

    Attributes:
        split: on which comparisons.
        by: the options that rows are grouped by.
        rows: heads first, then yardsticks, each by their options.
        draws: of the bootstrap.
        level: below which a p-value supports a difference.
        notes: sentences that belong beside the table.
    """

    split: str
    by: tuple[str, ...]
    rows: tuple[ContrastRow, ...]
    draws: int
    level: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: `rows: [{rule, options, runs, metrics, best, behind, p, paths}]`, and how they came about."""
        test = {"method": "paired bootstrap over users, Holm", "draws": self.draws, "level": self.level}
        rows = [row.to_dict() for row in self.rows]
        return {"split": self.split, "by": list(self.by), "test": test, "rows": rows, "notes": list(self.notes)}


def compare_runs(
    paths: Sequence[Path],
    *,
    by: Sequence[str] | None = None,
    split: str = "test",
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Contrasts:
    """Compare runs: run folders, sweep folders and folders of runs.

    Args:
        paths: the folders.
        by: options to group by; None takes all that differ, seeds left out.
        split: `test` or `val`.
        draws: of the bootstrap.
        level: of the test.
        seed: of the bootstrap.

    Raises:
        InputError: there is no complete run, or an option or a split is unknown.

    Warns:
        PalcacheWarning: a run is left out.
    """
    test = PairedTest(draws, level, seed)
    return contrast_records(read_records(paths), by=by, split=split, test=test)


def contrast_records(
    records: Sequence[RunRecord],
    *,
    by: Sequence[str] | None = None,
    split: str = "test",
    test: PairedTest | None = None,
) -> Contrasts:
    """Compare runs that are read already; arguments as for `compare_runs`."""
    test = test or PairedTest()
    if any(split not in record.evaluations for record in records):
        raise InputError(f"Got the split {split}; expected one of {', '.join(records[0].evaluations)}.")
    found = differing(records)
    chosen = tuple(dict.fromkeys(by)) if by is not None else found
    _refuse_unknown(chosen, records)
    notes = []
    mixed = [name for name in found if name not in chosen]
    if mixed:
        notes.append(f"Runs of a row also differ in {', '.join(mixed)}; means and deviations are over all of them.")
    groups = _grouped(records, chosen)
    rows = tuple(_row(rule, options, members, split) for (rule, options), members in groups)
    scored = [_scores(rule, members, split) for (rule, _), members in groups]
    rows, said = _tested(rows, scored, test)
    return Contrasts(split, chosen, rows, test.draws, test.level, (*notes, *said))


def _refuse_unknown(by: Iterable[str], records: Sequence[RunRecord]) -> None:
    known = list(dict.fromkeys(name for record in records for name in record.options))
    for name in by:
        if name not in known:
            hint = did_you_mean(name, known, f"the options are {', '.join(known)}.")
            raise InputError(f"No run has an option {name}; {hint}")


def _grouped(
    records: Sequence[RunRecord], by: Sequence[str]
) -> list[tuple[tuple[str, dict[str, Any]], list[RunRecord]]]:
    """Return the members of each row; runs that are the same for a rule count once."""
    groups: dict[tuple[str, str], tuple[tuple[str, dict[str, Any]], list[RunRecord]]] = {}
    same: set[tuple[str, str]] = set()
    for record in records:
        for rule in RULES:
            options = record.options_of(rule)
            once = (rule, repr(sorted(options.items())))
            if once in same:
                continue
            same.add(once)
            shown = {name: options[name] for name in by if name in options}
            groups.setdefault((rule, repr(shown)), ((rule, shown), []))[1].append(record)
    return sorted(groups.values(), key=lambda group: (RULES.index(group[0][0]), _order(group[0][1], by)))


def _order(options: Options, by: Sequence[str]) -> list[tuple[int, float, str]]:
    """Return what sorts rows: numbers by size, then texts."""
    out = []
    for name in by:
        value = options.get(name)
        number = isinstance(value, int | float)
        out.append((0, float(value or 0), "") if number else (1, 0.0, str(value)))
    return out


def _row(rule: str, options: Options, members: Sequence[RunRecord], split: str) -> ContrastRow:
    evaluations = [record.evaluations[split][rule] for record in members]
    metrics = {}
    for name in METRICS:
        values = [value for evaluation in evaluations if (value := metric_of(evaluation, name)) is not None]
        if values:
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            metrics[name] = Spread(float(np.mean(values)), deviation)
    return ContrastRow(rule, options, len(members), metrics, paths=tuple(record.path for record in members))


def metric_of(evaluation: Evaluation, name: str) -> float | None:
    """Return one of `METRICS`; None where a rule has no probabilities."""
    if name in evaluation.accuracy:
        return evaluation.accuracy[name].value
    value: float | None = getattr(evaluation, name)
    return value


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """How often a row's runs are right on each comparison.

    Attributes:
        comparisons: digests of which comparisons these are.
        right: share of runs that are right, (n,).
        user: code of each comparison's user, (n,).
    """

    comparisons: str
    right: Array
    user: Codes


def _scores(rule: str, members: Sequence[RunRecord], split: str) -> Scores | None:
    """Return a row's scores, or None where a run has no predictions."""
    right: dict[str, list[Array]] = {}
    users: dict[str, list[str]] = {}
    for record in members:
        found = record.predictions()
        part = found.splits.get(split) if found else None
        if found is None or part is None or rule not in part.margins:
            return None
        which = arrays_digest({found.table: part.rows})  # a table may be split in several ways
        right.setdefault(which, []).append(correctness(part.margins[rule], part.y))
        users.setdefault(which, [found.users[at] for at in part.user.tolist()])
    parts = sorted(right)
    _, user = np.unique([name for which in parts for name in users[which]], return_inverse=True)
    return Scores(" ".join(parts), np.concatenate([np.mean(right[which], axis=0) for which in parts]), user)


def _tested(
    rows: tuple[ContrastRow, ...], scored: Sequence[Scores | None], test: PairedTest
) -> tuple[tuple[ContrastRow, ...], list[str]]:
    """Return the rows with their tests, and what has to be said about them."""
    scores = [found for found in scored if found is not None]
    if len(scores) < len(rows):
        unpaired = sorted({path for row in rows for path in row.paths if not (path / PREDICTIONS).is_file()})
        more = f" (and {len(unpaired) - 1} more)" if len(unpaired) > 1 else ""
        note = (
            f"Nothing is tested or marked: the test is paired, and {unpaired[0]}{more} has no {PREDICTIONS}; train again to "
            "have it."
        )
        return rows, [note]
    out, notes = list(rows), []
    few: set[int] = set()
    families: dict[str, list[int]] = {}
    for at, found in enumerate(scores):
        families.setdefault(found.comparisons, []).append(at)
    if len(families) > 1:
        notes.append("Rows of different comparisons are not tested against each other.")
    for members in families.values():
        ranked = sorted(members, key=lambda at: -scores[at].right.mean())
        first = ranked[0]
        others = [at for at in ranked[1:] if not _is_itself(rows[first], rows[at], scores[first], scores[at])]
        users = len(np.unique(scores[first].user))
        if not others or users < 2:
            continue
        if users < FEW_USERS:
            few.add(users)
        right = [scores[at].right for at in others]
        tests = paired_test(scores[first].right, right, scores[first].user, draws=test.draws, seed=test.seed)
        for at, (behind, p) in zip(others, tests, strict=True):
            out[at] = replace(rows[at], behind=behind, p=p)
        out[first] = replace(rows[first], best=all(p < test.level and behind.low > 0 for behind, p in tests))
    if few:
        counts = " or ".join(map(str, sorted(few)))
        notes.append(f"There are {counts} users; with fewer than {FEW_USERS} the test is too sure of itself.")
    return tuple(out), notes


def _is_itself(first: ContrastRow, other: ContrastRow, ours: Scores, theirs: Scores) -> bool:
    """Return whether a row is a head of k = 1 and the other its yardstick, or the reverse: one head under two names."""
    return first.rule != other.rule and np.array_equal(ours.right, theirs.right)
