"""Pictures and tables are made of the history and give the same bytes each time."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from palcache.errors import PalcacheError
from palcache.reports import draw_history, write_history
from palcache.training import HistoryRow

HISTORY = tuple(
    HistoryRow(7 * i, 0.5 * i, 1 / i, 0.1 + 0.2 / i, 0.5 + 0.01 * i, 10.0**-i, 14.0 + i) for i in range(1, 6)
)


def test_a_picture_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw_history(tmp_path / name, HISTORY, best_step=21, title="table: k = 2")
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content == (tmp_path / "two.png").read_bytes()
    assert b"matplotlib" not in content.lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_a_picture_shows_the_history_and_the_chosen_step(tmp_path: Path) -> None:
    draw_history(tmp_path / "one.png", HISTORY, best_step=21)
    draw_history(tmp_path / "two.png", HISTORY, best_step=28)
    draw_history(tmp_path / "three.png", HISTORY[:-1], best_step=21)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3


def test_curves_are_the_history_and_the_chosen_step_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def keep(self: Figure, path: Path, **_options: object) -> None:
        drawn.append(self)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_history(tmp_path / "one.png", HISTORY, best_step=21, title="a title")
    losses, accuracy = (
        {str(line.get_label()): np.array(line.get_data()).tolist() for line in axes.lines} for axes in drawn[0].axes
    )
    steps = [row.step for row in HISTORY]
    assert losses["training"] == [steps, [row.train_loss for row in HISTORY]]
    assert losses["validation"] == [steps, [row.val_loss for row in HISTORY]]
    assert accuracy["validation"] == [steps, [row.val_accuracy for row in HISTORY]]
    assert losses["chosen: step 21"] == accuracy["chosen: step 21"] == [[21, 21], [0, 1]]
    assert drawn[0].get_suptitle() == "a title"


def test_one_evaluation_can_be_drawn(tmp_path: Path) -> None:
    draw_history(tmp_path / "one.png", HISTORY[:1], best_step=7)
    assert (tmp_path / "one.png").stat().st_size > 1_000


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PalcacheError, match="needs matplotlib; install it: pip install matplotlib"):
        draw_history(tmp_path / "one.png", HISTORY, best_step=7)
    assert not list(tmp_path.iterdir())


def test_the_table_holds_every_evaluation_to_the_last_digit(tmp_path: Path) -> None:
    write_history(tmp_path / "history.csv", HISTORY)
    content = (tmp_path / "history.csv").read_bytes()
    assert content.startswith(b"step,epoch,train_loss,val_loss,val_accuracy,lr,scale\n")
    assert b"\r" not in content
    rows = list(csv.reader(content.decode().splitlines()[1:]))
    assert tuple(HistoryRow(int(row[0]), *map(float, row[1:])) for row in rows) == HISTORY
