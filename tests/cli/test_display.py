"""Tables cut nothing, progress goes to stderr, and JSON is one object."""

from __future__ import annotations

import io
import json
import math
import re
import sys

import pytest
from palcache_cli.display import print_evaluations, print_json, print_table, progress

from palcache.evaluation import Evaluation
from palcache.metrics import Estimate

COLUMNS = ["space", "model", "rows"]
ROWS = [["0d8b1d8a", "sentence-transformers/" + "x" * 60, "1,234"], ["[bold]", "a :smile: b", "7"]]


class Terminal(io.StringIO):
    """A terminal, as far as anyone asks; `getvalue` leaves colours out."""

    def isatty(self) -> bool:
        """Say that it is one."""
        return True

    def getvalue(self) -> str:
        """Return the text without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", super().getvalue())


def shown(monkeypatch: pytest.MonkeyPatch, width: int | None, rows: list[list[str]] = ROWS) -> str:
    """Return what a table looks like on a terminal of some width, or elsewhere."""
    stream = io.StringIO() if width is None else Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setenv("TERM", "dumb" if width is None else "xterm")
        patch.setenv("COLUMNS", str(width or 40))
        patch.setenv("LINES", "30")
        print_table("a title that is rather longer than forty columns, to be sure", COLUMNS, rows, text=2)
    return stream.getvalue()


@pytest.mark.parametrize("width", [None, 20, 40, 80, 120, 300])
def test_no_cell_is_cut_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int | None) -> None:
    text = shown(monkeypatch, width)
    for cell in [*COLUMNS, *(cell for row in ROWS for cell in row)]:
        assert cell in text
    assert "\u2026" not in text
    assert "a title that is rather longer than forty columns, to be sure" in text


@pytest.mark.parametrize("width", [None, 120])
def test_a_row_is_a_line_where_it_fits(monkeypatch: pytest.MonkeyPatch, width: int | None) -> None:
    lines = shown(monkeypatch, width).splitlines()
    assert [line.split() for line in lines if "0d8b1d8a" in line] == [ROWS[0]]
    header, first = (next(line for line in lines if word in line) for word in ("model", "0d8b1d8a"))
    assert header.index("model") == first.index("sentence")  # text stands left
    assert header.rstrip().endswith("rows")
    assert len(header.rstrip()) == len(first.rstrip())  # numbers stand right


def test_a_row_is_a_block_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 40).splitlines()
    assert lines[1:5] == ["  space  0d8b1d8a", f"  model  {ROWS[0][1]}", "  rows   1,234", ""]


def test_an_empty_table_has_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model" in shown(monkeypatch, None, [])


def evaluation(low: float = 0.7) -> Evaluation:
    estimate = Estimate(0.75, low, 0.8 if math.isfinite(low) else math.nan)
    return Evaluation(8, 2, 0, {"micro": estimate, "macro": estimate, "worst_tenth": estimate}, 0.5, 0.2, 0.1)


def test_evaluations_are_a_column_per_rule(capsys: pytest.CaptureFixture[str]) -> None:
    longer = Evaluation(8, 2, 0, evaluation(math.nan).accuracy)
    print_evaluations("test", {"head": evaluation(), "longer": longer}, {"head": "PAL-B"})
    lines = {
        line.strip().split("  ")[0]: line.split()[-4:] for line in capsys.readouterr().out.splitlines() if "0." in line
    }
    assert lines["accuracy"][-2:] == ["0.7500", "0.7500"]
    assert lines["95 % interval"] == ["0.700", "to", "0.800", "-"]
    assert lines["log-loss"][-2:] == ["0.5000", "-"]
    assert lines["ECE"][-2:] == ["0.1000", "-"]


def test_evaluations_fit_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    names = {"a": "longer response", "b": "one reward (k = 1)", "c": "two prototypes (k = 2)"}
    print_evaluations("test", dict.fromkeys(names, evaluation()), names)
    lines = stream.getvalue().splitlines()
    assert any(all(name in line for name in names.values()) for line in lines)


def test_json_is_one_line_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": "\u00fc", "b": [1.5, None]})
    out = capsys.readouterr().out
    assert out == '{"a": "\u00fc", "b": [1.5, null]}\n'
    assert json.loads(out) == {"a": "\u00fc", "b": [1.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"a": math.nan})


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("palcache_cli.display.time.monotonic", lambda: clock[0])
    with progress("work") as bar:
        for second in range(13):
            clock[0] = 100.0 + second
            bar.update(second, 12, f"at {second}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "work:   8%  at 1  eta 11 s",
        "work:  50%  at 6  eta 6 s",
        "work:  92%  at 11  eta 1 s",
        "work: 100%  at 12",
    ]


def test_short_work_says_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work") as bar:
        bar.update(0, 0, "nothing to do")
    assert capsys.readouterr().err == "work: 100%  nothing to do\n"
    with progress("silence"):
        pass
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress("work") as bar:
        bar.update(3, 4, "fast")
    assert "work" in stream.getvalue()
    assert "75%" in stream.getvalue()
    assert "fast" in stream.getvalue()
    assert capsys.readouterr().out == ""
