"""The benchmarks run, compare with what they say, and keep their rows in the machine's file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import NAMES, main
from benchmarks.matmuls import products_of_step
from benchmarks.measuring import Machine, Ratio, in_turn, ratio
from benchmarks.plain_loops import PlainPalB, palcache_margins
from benchmarks.results import COLUMNS, as_page, as_table, merged, read_rows, row, write_page
from benchmarks.sources import mixed_texts
from palcache.heads import PalB
from palcache.tensors import PairBatch

ROOT = Path(__file__).parents[1]
HEAD = PalB(d=7, p=5, k=3, users=4, projector="mlp2-relu-dropout1", temperature=1.0)
CHEAP = ("plan", "read", "train", "sweep", "adapt")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the cheap benchmarks as a user would; return the file they leave."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", *CHEAP, "--quick", "--out", str(out), "--date", "today"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # on a busy machine threads mostly wait for each other
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    path = out / f"{Machine.here().slug}.md"
    assert done.stdout.startswith("| benchmark | what |")
    return path


def test_quick_benchmarks_leave_a_well_formed_file(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# Benchmarks on {Machine.here().name}\n")
    assert "Date: today." in text
    assert "these figures mean nothing" in text
    rows = read_rows(page)
    assert tuple(dict.fromkeys(r.benchmark for r in rows)) == CHEAP
    assert all(len(r.cells) == len(COLUMNS) and "-" not in {r.what, r.goal, r.measured} for r in rows)
    assert {r.met for r in rows} <= {"yes", "no"}
    assert all(r.note for r in rows if r.benchmark in {"plan", "train"})


def test_rows_of_other_benchmarks_stay(page: Path) -> None:
    before = read_rows(page)
    new = [row("read", "anew", "cpu", against="nothing", goal="1").with_ratio(Ratio(2.0, 1.5, 2.5), 1, "two", "a note")]
    write_page(page, as_page(Machine.here(), merged(before, new, NAMES), about=[]))
    after = read_rows(page)
    assert [r for r in after if r.benchmark != "read"] == [r for r in before if r.benchmark != "read"]
    assert [r for r in after if r.benchmark == "read"] == new


def test_cells_hold_no_bars_or_line_ends() -> None:
    odd = row("read", "a | b\nc", "cpu", against="", goal="1").skipped("no | way")
    (line,) = as_table([odd]).splitlines()[2:]
    assert line == "| read | a / b c | cpu | - | 1 | - | skipped: no / way | - |"


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["raed"])
    assert "no benchmark raed; there are encode" in capsys.readouterr().err


def test_things_are_timed_in_turn() -> None:
    order: list[str] = []

    def job(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    seconds = in_turn({"a": lambda: job("a", 3.0), "b": lambda: job("b", 2.0)}, 3)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert ratio(seconds["a"], seconds["b"]) == Ratio(1.5, 1.5, 1.5)
    assert str(ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])) == "3.00 (2.00 to 4.00)"


def test_the_plain_head_is_the_same_head() -> None:
    random = torch.Generator().manual_seed(0)
    drawn = HEAD.initial(random)
    parameters = {name: torch.randn(value.shape, generator=random) for name, value in drawn.items()}
    prompts, left, right = (torch.randn(11, HEAD.d, generator=random) for _ in range(3))
    user = torch.randint(HEAD.users, (11,), generator=random)
    plain = PlainPalB(HEAD, parameters).eval()
    rows = torch.arange(11)
    batch = PairBatch(prompts, rows, torch.cat([left, right]), rows, rows + 11, user, torch.ones(11))
    expected = HEAD.margins(parameters, batch)
    torch.testing.assert_close(plain(prompts, left, right, user), expected)
    noisy = palcache_margins(HEAD, parameters, "cpu")(prompts, left, right, user)
    assert noisy.shape == expected.shape
    assert not torch.equal(noisy, expected)


def test_the_products_are_those_of_a_step() -> None:
    n, d, p, k = 11, HEAD.d, HEAD.p, HEAD.k
    rows = torch.arange(n)
    batch = PairBatch(torch.ones(n, d), rows, torch.ones(2 * n, d), rows, rows + n, rows % 4, torch.ones(n))
    per_row = 2 * d * p + 6 * p * p  # forward and gradient of the weights in three layers, of the input in two
    assert products_of_step(HEAD, batch).flops == 2 * (2 * n + k * n) * per_row
    products_of_step(HEAD, batch).run()


def test_texts_are_distinct_and_of_mixed_length() -> None:
    texts = mixed_texts(400, seed=3)
    lengths = sorted(len(text.split()) for text in texts)
    assert len(set(texts)) == 400
    assert texts == mixed_texts(400, seed=3)
    assert lengths[20] < 20
    assert lengths[-20] > 100
