"""A comparison of runs as text for other programs: CSV, and LaTeX for a paper (booktabs)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Final

from palcache.choices import RULE_NAMES
from palcache.contrasts import METRICS, ContrastRow, Contrasts, Spread

HEADINGS: Final[Mapping[str, str]] = {
    "micro": "accuracy",
    "macro": "macro",
    "worst_tenth": "worst tenth",
    "log_loss": "log-loss",
    "calibration_error": "ECE",
}
_ESCAPES: Final = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "\n": " ",
    }
)


def option_text(value: object) -> str:
    """Return an option's value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def row_options(row: ContrastRow, by: Sequence[str]) -> list[str]:
    """Return the cells of a row's options; `-` where one does not concern the rule."""
    return [option_text(row.options[name]) if name in row.options else "-" for name in by]


def spread_text(spread: Spread | None, sign: str = "+-") -> str:
    """Return a mean and its deviation, where there are any."""
    if spread is None:
        return "-"
    return f"{spread.mean:.4f}" + ("" if spread.deviation is None else f" {sign} {spread.deviation:.4f}")


def behind_cells(row: ContrastRow) -> list[str]:
    """Return by how much a row is behind the first, with its interval, and the p-value; empty where it was not tested."""
    if row.behind is None or row.p is None:
        return ["", ""]
    return [f"{row.behind.value:.3f} ({row.behind.low:.3f} to {row.behind.high:.3f})", f"{row.p:.4f}"]


def remarks(contrasts: Contrasts) -> list[str]:
    """Return the sentences that belong beside the table: what +- and a mark mean, and the notes."""
    out = ["+- is the sample standard deviation over runs (n - 1)."]
    if any(row.p is not None for row in contrasts.rows):
        out.append(
            f"The best is marked where a paired bootstrap over users ({contrasts.draws:,} draws) supports its accuracy against "
            f"every other row of the same comparisons at the level {contrasts.level:g}, p-values corrected by Holm's method."
        )
    return [*out, *contrasts.notes]


def contrasts_csv(contrasts: Contrasts) -> str:
    """Return a row per line, mean and deviation of each metric in columns of their own, to the last digit."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    metrics = [f"{name}{ending}" for name in METRICS for ending in ("", "_deviation")]
    writer.writerow(["rule", *contrasts.by, "runs", *metrics, "best", "behind", "behind_low", "behind_high", "p"])
    for row in contrasts.rows:
        cells: list[object] = [row.rule, *(row.options.get(name, "") for name in contrasts.by), row.runs]
        for name in METRICS:
            spread = row.metrics.get(name)
            cells += [None, None] if spread is None else [spread.mean, spread.deviation]
        behind = row.behind
        cells += [
            int(row.best),
            *((None, None, None) if behind is None else (behind.value, behind.low, behind.high)),
            row.p,
        ]
        writer.writerow(cells)
    return buffer.getvalue()


def contrasts_latex(contrasts: Contrasts) -> str:
    """Return a `tabular` for booktabs, the best row's accuracy in bold, preceded by comments that say what it holds."""
    by = [escape_latex(name.replace("_", " ")) for name in contrasts.by]
    columns = "l" + "l" * len(by) + "r" + "r" * len(METRICS)
    lines = [
        *(f"% {' '.join(sentence.split())}" for sentence in (f"Split: {contrasts.split}.", *remarks(contrasts))),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(["", *by, "runs", *(escape_latex(HEADINGS[name]) for name in METRICS)]) + r" \\",
        r"\midrule",
    ]
    before = contrasts.rows[0].rule if contrasts.rows else ""
    for row in contrasts.rows:
        if before == "head" != row.rule:
            lines.append(r"\midrule")
        before = row.rule
        options = map(escape_latex, row_options(row, contrasts.by))
        cells = [_math(row.metrics.get(name), bold=row.best and name == "micro") for name in METRICS]
        lines.append(" & ".join([escape_latex(RULE_NAMES[row.rule]), *options, str(row.runs), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _math(spread: Spread | None, *, bold: bool) -> str:
    if spread is None:
        return "--"
    mean = rf"\mathbf{{{spread.mean:.3f}}}" if bold else f"{spread.mean:.3f}"
    return f"${mean}$" if spread.deviation is None else rf"${mean} \pm {spread.deviation:.3f}$"


def escape_latex(text: str) -> str:
    """Return a text that LaTeX prints as it is."""
    return text.translate(_ESCAPES)
