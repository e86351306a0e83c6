"""Runs are compared over seeds, and the best is marked only where a paired test over users supports it."""

from __future__ import annotations

import csv
import io
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palcache.configs import FitConfig, HeadConfig
from palcache.contrasts import Contrasts, compare_runs
from palcache.errors import InputError, PalcacheWarning
from palcache.pages.contrast_tables import contrasts_csv, contrasts_latex, escape_latex
from palcache.paired_tests import holm, paired_test
from palcache.runs.folders import read_evaluations
from palcache.runs.records import find_runs, read_records
from tests.made_runs import make_run

SKILLS = {1: 0.2, 2: 1.5, 3: 1.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of k = 1, 2, 3 with three seeds each; k = 2 is clearly the best."""
    folder = tmp_path_factory.mktemp("runs")
    for k, skill in SKILLS.items():
        for seed in range(3):
            make_run(folder / f"k{k}-s{seed}", head=HeadConfig(k=k, p=3), fit=FitConfig(seed=seed), skill=skill)
    return folder


def row_of(found: Contrasts, rule: str, **options: Any) -> Any:
    """Return the one row of a rule with these options."""
    rows = [row for row in found.rows if row.rule == rule and options.items() <= row.options.items()]
    assert len(rows) == 1
    return rows[0]


def test_rows_are_means_and_sample_deviations_over_seeds(runs: Path) -> None:
    found = compare_runs([runs], draws=500)
    assert found.by == ("k",)
    assert [(row.rule, dict(row.options), row.runs) for row in found.rows] == [
        ("head", {"k": 1}, 3), ("head", {"k": 2}, 3), ("head", {"k": 3}, 3),
        ("user_blind", {"k": 1}, 3), ("longer", {}, 1),
    ]  # fmt: skip
    evaluations = [read_evaluations(runs / f"k2-s{seed}")["test"]["head"] for seed in range(3)]
    row = row_of(found, "head", k=2)
    for name in ("micro", "macro", "worst_tenth"):
        values = [evaluation.accuracy[name].value for evaluation in evaluations]
        mean = sum(values) / 3
        assert row.metrics[name].mean == pytest.approx(mean)
        assert row.metrics[name].deviation == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
    losses = [evaluation.log_loss for evaluation in evaluations]
    assert row.metrics["log_loss"].mean == pytest.approx(sum(losses) / 3)  # type: ignore[arg-type]
    longer = row_of(found, "longer")
    assert longer.metrics.keys() == {"micro", "macro", "worst_tenth"}
    assert longer.metrics["micro"].deviation is None


def test_the_best_is_marked_where_it_is_clearly_ahead_of_all(runs: Path) -> None:
    found = compare_runs([runs])
    assert [row.options.get("k") for row in found.rows if row.best] == [2]
    row = row_of(found, "head", k=3)
    assert row.p < 0.05
    assert 0 < row.behind.low < row.behind.value < row.behind.high
    best = row_of(found, "head", k=2)
    assert (best.behind, best.p) == (None, None)
    assert row.behind.value == pytest.approx(best.metrics["micro"].mean - row.metrics["micro"].mean)


def test_nothing_is_marked_where_the_first_is_ahead_by_chance(tmp_path: Path) -> None:
    for name, lr in (("a", 1e-3), ("b", 3e-4)):
        for seed in range(3):
            make_run(tmp_path / f"{name}{seed}", fit=FitConfig(lr=lr, seed=seed + len(name) * int(lr * 1e6)), skill=0.6)
    found = compare_runs([tmp_path])
    assert found.by == ("lr",)
    heads = [row for row in found.rows if row.rule == "head"]
    assert not any(row.best for row in found.rows)
    assert max(row.p or 0 for row in heads) > 0.05


def test_another_split_is_compared_on_its_own_comparisons(runs: Path) -> None:
    found = compare_runs([runs], split="val", draws=200)
    values = [read_evaluations(runs / f"k3-s{seed}")["val"]["head"].accuracy["micro"].value for seed in range(3)]
    assert row_of(found, "head", k=3).metrics["micro"].mean == pytest.approx(np.mean(values))
    with pytest.raises(InputError, match="Got the split train; expected one of val, test"):
        compare_runs([runs], split="train")


def test_a_coarser_grouping_says_what_it_mixes(runs: Path) -> None:
    found = compare_runs([runs], by=["lr"], draws=200)
    assert row_of(found, "head").runs == 9
    assert "Runs of a row also differ in k; means and deviations are over all of them." in found.notes
    by_seed = compare_runs([runs], by=["k", "seed"], draws=200)
    assert len([row for row in by_seed.rows if row.rule == "head"]) == 9
    with pytest.raises(InputError, match="No run has an option lrate; did you mean lr"):
        compare_runs([runs], by=["lrate"])


def test_old_runs_without_predictions_are_compared_without_a_test(tmp_path: Path, runs: Path) -> None:
    make_run(tmp_path / "old", head=HeadConfig(k=4, p=3), predictions=False)
    found = compare_runs([runs, tmp_path])
    assert row_of(found, "head", k=4).runs == 1
    assert not any(row.best or row.p is not None for row in found.rows)
    said = (
        f"Nothing is tested or marked: the test is paired, and {tmp_path / 'old'} has no predictions.safetensors; train again "
        "to have it."
    )
    assert found.notes == (said,)


def test_other_comparisons_are_not_tested_against_each_other(tmp_path: Path, runs: Path) -> None:
    make_run(tmp_path / "other", table="beef", skill=3)
    found = compare_runs([runs, tmp_path / "other"], draws=2_000)
    assert "Rows of different comparisons are not tested against each other." in found.notes
    assert "table" in found.by
    marked = [row.options["table"] for row in found.rows if row.best]
    assert sorted(str(name) for name in marked) == ["table (beef)", "table (f00d)"]


def test_another_split_of_the_table_is_another_try_and_not_another_row(tmp_path: Path) -> None:
    for k, skill in ((1, 0.3), (2, 1.5)):
        for seed in range(2):
            for split in range(2):
                path = tmp_path / f"{k}-{seed}-{split}"
                make_run(path, head=HeadConfig(k=k, p=3), fit=FitConfig(seed=seed), skill=skill, split_seed=split)
    found = compare_runs([tmp_path])
    assert found.by == ("k",)
    assert [(row.rule, row.runs) for row in found.rows] == [("head", 4), ("head", 4), ("user_blind", 4), ("longer", 2)]
    assert [row.options.get("k") for row in found.rows if row.best] == [2]
    longer = [read_evaluations(tmp_path / f"1-0-{split}")["test"]["longer"].accuracy["micro"].value for split in (0, 1)]
    assert row_of(found, "longer").metrics["micro"].mean == pytest.approx(np.mean(longer))


def test_the_first_row_is_first_by_what_is_tested(tmp_path: Path) -> None:
    """A split of few comparisons counts as a run in the mean; the test counts comparisons, and would mark the worse row."""
    for k, skills in ((1, (4.0, 0.6)), (2, (0.0, 1.2))):
        for split, (skill, per_user) in enumerate(zip(skills, (2, 60), strict=True)):
            make_run(
                tmp_path / f"{k}-{split}", head=HeadConfig(k=k, p=3), skill=skill, per_user=per_user, split_seed=split
            )
    found = compare_runs([tmp_path], draws=2_000)
    few, many = row_of(found, "head", k=1), row_of(found, "head", k=2)
    assert few.metrics["micro"].mean > many.metrics["micro"].mean
    assert few.p < 0.05
    assert 0 < few.behind.low < few.behind.value
    assert (few.best, many.best) == (False, True)


def test_few_users_are_pointed_out_once(tmp_path: Path) -> None:
    for table in ("beef", "f00d"):
        make_run(tmp_path / table, users=("a", "b", "c"), table=table)
    said = "There are 3 users; with fewer than 20 the test is too sure of itself."
    assert compare_runs([tmp_path]).notes.count(said) == 1


def test_runs_that_do_not_count_are_left_out_with_a_warning(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    shutil.copytree(tmp_path / "a", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "metrics.json").unlink()
    with pytest.warns(PalcacheWarning) as caught:
        records = read_records([tmp_path])
    assert [record.path.name for record in records] == ["a"]
    said = sorted(str(warning.message) for warning in caught)
    assert said[0].endswith(f"copy is left out: it has the options and the seed of {tmp_path / 'a'}.")
    assert said[1].endswith("unfinished is left out: it is not finished.")
    with (
        pytest.warns(PalcacheWarning, match="not finished"),
        pytest.raises(InputError, match=r"None of the 1 runs in .*unfinished is finished; train them first"),
    ):
        read_records([tmp_path / "unfinished"])


def test_runs_are_found_in_runs_folders_and_sweeps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sweep" / "runs" / "a")
    assert (
        find_runs([tmp_path / "sweep"]) == find_runs([run]) == find_runs([run, tmp_path / "sweep" / "runs"]) == (run,)
    )
    with pytest.raises(InputError, match=r"is no run folder and holds none; give a folder that palcache train-head"):
        find_runs([tmp_path])


def test_the_paired_test_has_the_level_that_it_names() -> None:
    """Where two rules are equally good, one in twenty tests at 0.05 says otherwise; a real difference is found."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(40), 15)
    found = []
    for trial in range(300):
        taste = rng.normal(0, 0.1, (2, 40))
        first, other = ((rng.random(600) < 0.7 + taste[i, user]).astype(float) for i in (0, 1))
        found.append(paired_test(first, [other], user, draws=400, seed=trial)[0][1] < 0.05)
    assert 0.02 < np.mean(found) < 0.09
    better = (rng.random(600) < 0.9).astype(float)
    assert paired_test(better, [(rng.random(600) < 0.7).astype(float)], user)[0][1] < 0.001


def test_the_paired_test_counts_users_and_not_comparisons() -> None:
    """Two users with many comparisons each say as little as two users."""
    user = np.repeat([0, 1], 500)
    ahead = np.where(user == 0, 1.0, 0.45)
    (estimate, p) = paired_test(ahead, [np.full(1000, 0.5)], user, draws=4_000)[0]
    assert p > 0.4
    assert (estimate.low, estimate.high) == pytest.approx((-0.05, 0.5))


def test_holm_is_the_step_down_method() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_csv_has_every_number(runs: Path) -> None:
    found = compare_runs([runs], draws=200)
    rows = list(csv.DictReader(io.StringIO(contrasts_csv(found))))
    assert [row["rule"] for row in rows] == [row.rule for row in found.rows]
    assert float(rows[1]["micro"]) == found.rows[1].metrics["micro"].mean
    assert float(rows[1]["micro_deviation"]) == found.rows[1].metrics["micro"].deviation
    assert (rows[1]["k"], rows[1]["runs"], rows[1]["best"], rows[1]["p"]) == ("2", "3", "1", "")
    assert rows[-1]["log_loss"] == rows[-1]["k"] == ""


def test_latex_is_a_booktabs_table_of_escaped_text(tmp_path: Path) -> None:
    for name in ("mlp2-relu-dropout1", "mlp1-relu-dropout05"):
        make_run(tmp_path / name, head=HeadConfig(projector=name, p=3), skill=3 if "2" in name else 0.5)
    text = contrasts_latex(compare_runs([tmp_path]))
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{llrrrrrr}", r"\end{tabular}"):
        assert text.count(part) == (2 if part == r"\midrule" else 1)
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in lines}) == 1
    assert lines[2].startswith(r"head & mlp2-relu-dropout1 & 1 & $\mathbf{0.99")
    assert escape_latex("a_b & 50% {x} ~^\\ <$#>") == (
        r"a\_b \& 50\% \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} \textless{}\$\#\textgreater{}"
    )
