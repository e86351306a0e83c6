"""The rows that benchmarks yield, and the Markdown file of a machine that keeps them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Final, Literal, final

from benchmarks.measuring import Machine, Ratio

Met = Literal["yes", "no", "-"]
COLUMNS: Final = ("benchmark", "what", "on", "against", "goal", "ratio", "measured", "met")


_HOW: Final = (
    "Written by `python -m benchmarks`. A ratio is the median over rounds in which the two things were timed in turn, "
    "with the least and the greatest round behind it. On a busy machine whatever waits for all its threads at once loses "
    "most, so ratios too mean something on a quiet machine only."
)


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside what it is measured against.

    Attributes:
        benchmark: name of the benchmark that yields it.
        what: is measured.
        on: `cpu` or `cuda`.
        against: what it is compared with.
        goal: what it should be.
        ratio: the ratio and its range over the rounds, or `-`.
        measured: the figures themselves.
        met: whether the goal is met; `-` where nothing could be measured or there is no goal.
        note: profile or circumstances, printed below the table; may be empty.
    """

    benchmark: str
    what: str
    on: str
    against: str
    goal: str
    ratio: str
    measured: str
    met: Met
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row's cells in the order of `COLUMNS`."""
        return tuple(" ".join(str(cell).replace("|", "/").split()) or "-" for cell in astuple(self)[: len(COLUMNS)])

    @property
    def title(self) -> str:
        """Names the row among those of a file."""
        return f"{self.benchmark}, {self.what} ({self.on})".replace("|", "/")

    def skipped(self, why: str) -> Row:
        """Return the row with a reason in place of figures."""
        return replace(self, ratio="-", measured=f"skipped: {why}", met="-")

    def with_ratio(self, value: Ratio, least: float, measured: str, note: str = "") -> Row:
        """Return the row with a ratio that should be at least `least`."""
        return self.with_verdict(value.value >= least, measured, str(value), note)

    def with_verdict(self, met: bool, measured: str, ratio: str = "-", note: str = "") -> Row:
        """Return the row with its figures and whether they meet the goal."""
        return replace(self, ratio=ratio, measured=measured, met="yes" if met else "no", note=note)


def row(benchmark: str, what: str, on: str, *, against: str, goal: str) -> Row:
    """Return a row that is still to be measured."""
    return Row(benchmark, what, on, against, goal, "-", "-", "-")


def as_table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(r.cells for r in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def as_page(machine: Machine, rows: Sequence[Row], *, about: Sequence[str]) -> str:
    """Return the file of a machine."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    facts = [
        f"Machine: {machine.name}, {machine.threads} threads of torch, {machine.memory / 2**30:.0f} GiB of memory.",
        f"Versions: {versions}.",
        *about,
        _HOW,
    ]
    notes = [f"- **{r.title}**: {' '.join(r.note.split())}\n" for r in rows if r.note]
    head = f"# Benchmarks on {machine.name}\n\n" + "".join(f"{fact}\n\n" for fact in facts)
    return head + as_table(rows) + ("\n## Notes\n\n" + "".join(notes) if notes else "")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a machine's file; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | ")]
        if line.startswith("| ") and len(cells) == len(COLUMNS) and cells[0] not in {COLUMNS[0], "---"}:
            rows.append(Row(**dict(zip(COLUMNS, cells, strict=True))))  # type: ignore[arg-type]
    notes = dict(line.removeprefix("- **").split("**: ", 1) for line in lines if line.startswith("- **"))
    return [replace(r, note=notes.get(r.title, "")) for r in rows]


def merged(before: Sequence[Row], now: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Return old rows with those of the benchmarks that ran now replaced, in the benchmarks' order."""
    ran = {r.benchmark for r in now}
    kept = [r for r in before if r.benchmark not in ran and r.benchmark in order]
    return sorted([*kept, *now], key=lambda r: order.index(r.benchmark))


def write_page(path: Path, text: str) -> None:
    """Replace a file, wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
