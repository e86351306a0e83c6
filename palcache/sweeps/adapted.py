"""New users on every head of a sweep: the learning curves, and their mean over the heads."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from palcache.cache import Cache
from palcache.errors import InputError
from palcache.files import write_bytes
from palcache.runs.adapted import AdaptedRun, SeenPolicy, adapt_run
from palcache.sweeps.sweeps import SweepResult
from palcache.users.curves import SHOTS

DRAWS: Final = 5


@final
@dataclass(frozen=True, slots=True, eq=False)
class AdaptedSweep:
    """Learning curves of new users on the heads of a sweep.

    Attributes:
        table: name of the new users' table.
        curves: a head's name and its curve.
        skipped: names of heads that users cannot be adapted on: one prototype, or no mixtures of them.
        path: of the table of mean curves.
    """

    table: str
    curves: tuple[tuple[str, AdaptedRun], ...]
    skipped: tuple[str, ...]
    path: Path

    def means(self) -> list[tuple[int, float, float, int]]:
        """Return n, mean and standard deviation of the micro accuracy over the heads, and their number."""
        by_shots: dict[int, list[float]] = {}
        for _, run in self.curves:
            for point in run.points:
                by_shots.setdefault(point.shots, []).append(point.evaluation.accuracy["micro"].value)
        return [
            (shots, statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))
            for shots, found in sorted(by_shots.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: `table`, `heads.<name>` with each head's curve, and `curve.<n>` with mean and deviation."""
        return {
            "table": self.table,
            "heads": {name: run.to_dict() for name, run in self.curves},
            "skipped": list(self.skipped),
            "curve": {str(n): {"mean": mean, "sd": sd, "heads": count} for n, mean, sd, count in self.means()},
        }


def adapt_sweep(  # noqa: PLR0913 - keyword-only options
    sweep: SweepResult,
    cache: Cache,
    comparisons: str,
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    seen_users: SeenPolicy = "refuse",
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> AdaptedSweep:
    """Adapt every head of a sweep to the same new users; each run gets its curve, the sweep `new_users.csv`.

    Args:
        sweep: its heads are complete.
        cache: a cache with the texts of the table.
        comparisons: name of a table of the cache, or a file.
        shots: numbers of support comparisons, n.
        draws: orders of the support.
        seen_users: refuse a table with users of the heads, or leave their rows out.
        device: where.
        on_progress: called with heads done and in all.

    Raises:
        InputError: users can be adapted on none of the heads, or the table does not fit them.
        MismatchError: texts of the table are not in the cache.
    """
    complete = [head for head in sweep.heads if head.run is not None]
    fit = [head for head in complete if (head.path / "users.safetensors").is_file()]
    if not fit:
        raise InputError(
            f"Users cannot be adapted on any head of {sweep.path}: that needs mixtures of two or more prototypes (pal-b "
            "or pal-a with --mixture softmax or gumbel, or low-rank with --user-weights simplex)."
        )
    curves = []
    for number, head in enumerate(fit):
        run = adapt_run(head.path, cache, comparisons, shots=shots, draws=draws, seen_users=seen_users, device=device)
        curves.append((head.name, run))
        if on_progress:
            on_progress(number + 1, len(fit))
    skipped = tuple(head.name for head in complete if head not in fit)
    result = AdaptedSweep(curves[0][1].table, tuple(curves), skipped, sweep.path / "new_users.csv")
    write_bytes(result.path, _csv(result))
    return result


def _csv(result: AdaptedSweep) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["shots", "accuracy_mean", "accuracy_sd", "heads"])
    writer.writerows(result.means())
    return buffer.getvalue().encode()
