"""A sweep trains every head as `train_run` does, goes on after a kill, and reports what fails."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig
from palcache.errors import CacheError, InputError, MismatchError, NumericsError, PalcacheWarning
from palcache.heads import build_head
from palcache.runs.trainings import evaluate_run, load_run, train_run
from palcache.stacks import Member, fit_stack
from palcache.storage.locks import holding
from palcache.sweeps import plans as stack_plans
from palcache.sweeps import sweeps
from palcache.sweeps.adapted import adapt_sweep
from palcache.sweeps.grids import Grid, configs_of, parse_grid
from palcache.sweeps.plans import fit_members, plan_stacks
from palcache.sweeps.sweeps import SweepProgress, SweepResult, run_sweep
from tests.building import make_data
from tests.worlds import files_of, make_cache, planted_rows

LINALG_ERROR = torch.linalg.LinAlgError  # type: ignore[attr-defined]
QUICK = "p=4 projector=mlp1-relu-dropout1 epochs=2 batch_size=32 evaluations=3 "


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return the cache of a planted world of seven users."""
    return make_cache(tmp_path_factory.mktemp("sweeps") / "cache", *planted_rows())


def sweep(cache: Cache, path: Path, text: str, **options: Any) -> SweepResult:
    return run_sweep(cache, path, parse_grid(QUICK + text), **{"device": "cpu", **options})


def accuracies(result: SweepResult) -> list[tuple[float, ...]]:
    return [
        tuple(
            head.run.evaluations[s][r].accuracy["micro"].value for s in ("val", "test") for r in ("head", "user_blind")
        )
        for head in result.heads
        if head.run
    ]


def test_heads_equal_train_run_and_their_folders_differ_by_the_picture_alone(cache: Cache, tmp_path: Path) -> None:
    result = sweep(cache, tmp_path / "sweep", "k=1,3 lr=1e-2,3e-3")
    assert len(result.heads) == 4
    for number, head in enumerate(result.heads):
        shape, fit, _ = configs_of(head.params)
        alone = train_run(cache, tmp_path / f"alone-{number}", head=shape, config=fit, device="cpu")
        assert head.run is not None
        assert head.run.fitted is not None
        assert alone.fitted is not None
        assert head.run.fitted.best_step == alone.fitted.best_step
        for mine, theirs in zip(head.run.fitted.history, alone.fitted.history, strict=True):
            assert mine.val_loss == pytest.approx(theirs.val_loss, abs=1e-6)
            assert mine.train_loss == pytest.approx(theirs.train_loss, abs=1e-6)
        files, expected_files = files_of(head.path), files_of(alone.path, without=["curves.png"])
        assert files.keys() == expected_files.keys()
        assert files["config.json"] == expected_files["config.json"]
        assert head.run.evaluations.keys() == alone.evaluations.keys()
        for split, rules in alone.evaluations.items():
            for rule, expected in rules.items():
                found = head.run.evaluations[split][rule]
                assert found.accuracy["micro"].value == pytest.approx(expected.accuracy["micro"].value, abs=0.02)
                if expected.log_loss is not None:
                    assert found.log_loss == pytest.approx(expected.log_loss, abs=1e-6)


def products_are_alike(d: int, p: int, n: int) -> bool:
    """Return whether this machine's library multiplies matrices alike in a stack and alone, to the last bit."""
    g = torch.Generator().manual_seed(0)
    x, w, y = (torch.randn(16, rows, columns, generator=g) for rows, columns in ((n, d), (p, d), (n, p)))
    for left, right in ((x, w.transpose(1, 2)), (y, w), (y.transpose(1, 2), x)):
        if not all(torch.equal(torch.bmm(left, right)[i], left[i] @ right[i]) for i in (0, 7)):
            return False
    return True


def test_run_folders_of_whole_vectors_equal_those_of_train_run_byte_by_byte(tmp_path: Path) -> None:
    """Where a processor's vectors divide all sizes, a head in a stack is the head alone, whoever stands beside it."""
    if not products_are_alike(32, 16, 64):
        pytest.skip("this machine multiplies matrices in a batch in another order")
    cache = make_cache(tmp_path / "cache", *planted_rows(d=32, per_user=100))
    grid = "p=16 epochs=2 batch_size=100 evaluations=3 k=2 projector=mlp2-relu-dropout1,mlp1-gelu-dropout05 seed=0:3"
    result = run_sweep(cache, tmp_path / "sweep", parse_grid(grid), device="cpu", jobs=2)
    assert len(result.heads) == 6
    for number, head in enumerate(result.heads):
        shape, fit, _ = configs_of(head.params)
        path = tmp_path / f"alone-{number}"
        train_run(cache, path, head=shape, config=fit, device="cpu")
        assert files_of(head.path) == files_of(path, without=["curves.png"]), head.name


def test_the_table_has_a_line_per_head_with_yardsticks(cache: Cache, tmp_path: Path) -> None:
    result = sweep(cache, tmp_path / "sweep", "k=2,3 seed=0:2")
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert [row["name"] for row in rows] == [head.name for head in result.heads]
    assert [(row["k"], row["seed"]) for row in rows] == [("2", "0"), ("2", "1"), ("3", "0"), ("3", "1")]
    for row, head in zip(rows, result.heads, strict=True):
        assert head.run is not None
        assert float(row["test_accuracy"]) == head.run.evaluations["test"]["head"].accuracy["micro"].value
        for rule in ("user_blind", "longer"):
            value = head.run.evaluations["test"][rule].accuracy["micro"].value
            assert float(row[f"{rule}_test_accuracy"]) == value
    values = result.to_dict()
    assert set(values["heads"][0]) == {"name", "run", "params", "seconds", "val", "test", "yardsticks"}
    assert result.varied == ("k", "seed")


def test_options_not_asked_for_stand_at_their_defaults_in_the_table(cache: Cache, tmp_path: Path) -> None:
    sweep(cache, tmp_path / "sweep", "k=3")
    result = sweep(cache, tmp_path / "sweep", "lr=2e-3")
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert sorted((row["k"], row["lr"]) for row in rows) == [("2", "0.002"), ("3", "0.001")]
    assert set(result.varied) == {"k", "lr"}


def test_a_yardstick_is_trained_once_for_all_heads_it_stands_beside(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Member] = []
    original = fit_members

    def watched(members: Sequence[Member], *data: Any, **options: Any) -> Any:
        trained.extend(members)
        return original(members, *data, **options)

    monkeypatch.setattr(sweeps, "fit_members", watched)
    sweep(cache, tmp_path / "sweep", "k=1,2,3 seed=0:2 temperature=1.0,2.0")
    assert sorted(member.shape.k for member in trained) == [1, 1, *[2] * 4, *[3] * 4]
    trained.clear()
    result = sweep(cache, tmp_path / "sweep", "k=4 seed=0:2")
    assert [member.shape.k for member in trained] == [4, 4]
    assert len(result.heads) == 14


def test_more_values_train_what_is_new_and_nothing_again(cache: Cache, tmp_path: Path) -> None:
    first = sweep(cache, tmp_path / "sweep", "k=2 seed=0:2")
    before = {head.name: files_of(head.path) for head in first.heads}
    times = {head.name: (head.path / "metrics.json").stat().st_mtime_ns for head in first.heads}
    second = sweep(cache, tmp_path / "sweep", "k=2 seed=1:4")
    assert [head.params["seed"] for head in second.heads] == [0, 1, 2, 3]
    for head in second.heads[:2]:
        assert files_of(head.path) == before[head.name]
        assert (head.path / "metrics.json").stat().st_mtime_ns == times[head.name]
        assert head.seconds is None
        assert head.to_dict()["seconds"] is None
    assert all(head.seconds for head in second.heads[2:])
    spelled = sweep(cache, tmp_path / "sweep", "k=2 seed=0 lr=1e-3")  # the default, written out
    assert len(spelled.heads) == 4


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failing_head_is_reported_and_the_others_go_on(cache: Cache, tmp_path: Path, jobs: int) -> None:
    result = sweep(cache, tmp_path / "sweep", "k=0,2 lr=1e-2,1e30", jobs=jobs)
    errors = [head.error for head in result.heads]
    assert "Got k = 0; expected at least one prototype" in str(errors[0])
    assert errors[2] is None
    assert "The loss is nan at step" in str(errors[3])
    assert [head.run is None for head in result.heads] == [True, True, False, True]
    assert not result.heads[3].path.exists()
    assert [head.name for head in result.failed] == [result.heads[i].name for i in (0, 1, 3)]
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert "lower --lr" in rows[3]["error"]
    assert result.to_dict()["heads"][3]["error"] == errors[3]


def test_the_same_command_gives_the_same_table_and_impossible_heads_are_forgotten(cache: Cache, tmp_path: Path) -> None:
    path, text = tmp_path / "sweep", "seed=0:2 lr=1e-2,1e30 k=0,2"
    first = sweep(cache, path, text)
    before = (path / "results.csv").read_bytes()
    again = sweep(cache, path, text)
    assert [head.name for head in again.heads] == [head.name for head in first.heads]
    assert (path / "results.csv").read_bytes() == before
    other = run_sweep(cache, path, parse_grid("k=0,2 lr=1e-2,1e30 seed=0:2 " + QUICK), device="cpu")
    assert {head.name for head in other.heads} == {head.name for head in first.heads}
    assert len(other.heads) == 8
    assert [head.params["k"] for head in sweep(cache, path, "k=3").heads] == [2] * 4 + [3]
    assert all(head["k"] for head in json.loads((path / "sweep.json").read_bytes())["heads"])


def test_heads_of_different_kinds_and_yardsticks_go_together(cache: Cache, tmp_path: Path) -> None:
    grid = Grid(
        {"p": 4, "epochs": 1, "projector": "mlp1-relu-dropout1"},
        {"head": ["pal-b", "bradley-terry", "low-rank", "pca", "per-user", "pal-a"]},
    )
    result = run_sweep(cache, tmp_path / "sweep", grid, device="cpu")
    assert [head.error is None for head in result.heads] == [True] * 5 + [False]
    assert "--items joint" in str(result.heads[5].error)
    alone = train_run(
        cache, tmp_path / "alone", head=HeadConfig(p=4, head="per-user"), config=FitConfig(epochs=1), device="cpu"
    )
    found = result.heads[4].run
    assert found is not None
    assert found.evaluations["test"]["head"].log_loss == pytest.approx(alone.evaluations["test"]["head"].log_loss)


def test_splits_are_an_axis_that_evaluation_honours(cache: Cache, tmp_path: Path) -> None:
    result = sweep(cache, tmp_path / "sweep", "k=2 split_seed=0:2", unknown_users="generic")
    tested = [head.run.evaluations["test"] for head in result.heads if head.run]
    assert len({evaluations["longer"].accuracy["micro"].value for evaluations in tested}) == 2
    for head, expected in zip(result.heads, tested, strict=True):
        config = json.loads((head.path / "config.json").read_bytes())
        assert config["split"] == {"by": "pair", "seed": head.params["split_seed"], "test": 0.1, "val": 0.1}
        again = evaluate_run(head.path, cache, device="cpu", unknown_users="generic")
        assert {rule: value.to_dict() for rule, value in again.items()} == {
            rule: value.to_dict() for rule, value in expected.items()
        }


def test_progress_counts_heads_and_steps(cache: Cache, tmp_path: Path) -> None:
    events: list[SweepProgress] = []
    sweep(cache, tmp_path / "sweep", "k=2 seed=0:3", on_progress=events.append, jobs=1)
    assert events[-1].done == events[-1].heads == 3
    shares = [event.share for event in events]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=0.01)


def test_jobs_change_nothing(cache: Cache, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = [accuracies(sweep(cache, tmp_path / f"{jobs}", "k=1,2,3 seed=0:2", jobs=jobs)) for jobs in (1, 3)]
    assert found[0] == found[1]
    assert torch.get_num_threads() == threads


def test_other_tables_folders_and_settings_are_refused(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    sweep(cache, path, "k=2")
    rows, encoder = planted_rows(per_user=40)
    other = make_cache(tmp_path / "other", rows, encoder)
    with pytest.raises(
        MismatchError, match=r"was made on something else \(table\.fingerprint = .*name a new folder with --sweep"
    ):
        sweep(other, path, "k=2")
    with pytest.raises(MismatchError, match="unknown_users = refuse, now drop"):
        sweep(cache, path, "k=2", unknown_users="drop")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="exists and is no sweep; name a new folder with --sweep"):
        sweep(cache, tmp_path / "taken", "k=2")
    with pytest.raises(InputError, match=r"None of 1 heads can be trained; the first: head: Got k = 0"):
        sweep(cache, tmp_path / "new", "k=0")
    with pytest.raises(InputError, match=r"Got jobs = 0; expected at least 1"):
        sweep(cache, tmp_path / "new", "k=2", jobs=0)
    with pytest.raises(InputError, match=r"^Got --device cpu:0; expected cpu:N"):
        sweep(cache, tmp_path / "newer", "k=2", device="cpu:0,cpu")
    assert not (tmp_path / "newer").exists()
    assert [entry.name for entry in (tmp_path / "taken").iterdir()] == ["file"]
    with holding(path / ".lock"), pytest.raises(InputError, match=r"is being trained by another process; wait for it"):
        sweep(cache, path, "k=2")
    found = json.loads((path / "sweep.json").read_bytes())
    (path / "sweep.json").write_text(json.dumps({**found, "version": 9}))
    with pytest.raises(CacheError, match="is of format palcache-sweep version 9; expected palcache-sweep 1"):
        sweep(cache, path, "k=2")


def test_a_killed_sweep_goes_on_to_the_same_table(cache: Cache, tmp_path: Path) -> None:
    """SIGKILL as soon as the first run is complete, then again; each head is alone of its kind, and none can have k = 0."""
    text = "p=4 projector=mlp1-relu-dropout1 epochs=3 batch_size=16 evaluations=3 k=0,1,2,3,4,5"
    script = (
        "import sys; from pathlib import Path; from palcache import Cache, parse_grid, run_sweep\n"
        "run_sweep(Cache(Path(sys.argv[1])), Path(sys.argv[2]), parse_grid(sys.argv[3]), device='cpu', jobs=1)"
    )
    path = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", script, str(cache.path), str(path), text])
    deadline = time.monotonic() + 120
    while child.poll() is None and not list(path.glob("runs/*/metrics.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    complete = {run.parent for run in path.glob("runs/*/metrics.json")}
    before = {run: (run / "metrics.json").stat().st_mtime_ns for run in complete}
    assert complete
    assert not (path / "results.csv").exists()
    resumed = run_sweep(cache, path, parse_grid(text), device="cpu", jobs=1)
    whole = run_sweep(cache, tmp_path / "whole", parse_grid(text), device="cpu", jobs=1)
    assert {run: (run / "metrics.json").stat().st_mtime_ns for run in complete} == before
    assert [head.name for head in resumed.heads] == [head.name for head in whole.heads]
    assert (path / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()


def test_temporary_files_of_a_killed_process_do_not_make_a_folder_something_else(cache: Cache, tmp_path: Path) -> None:
    first, path = sweep(cache, tmp_path / "first", "k=2").heads[0], tmp_path / "sweep"
    for folder, name in ((path, ".sweep.json.4711.tmp"), (path / "runs" / first.name, ".config.json.4711.tmp")):
        folder.mkdir(parents=True)
        (folder / name).touch()
        if folder != path:
            (path / "sweep.json").write_bytes((tmp_path / "first" / "sweep.json").read_bytes())
            (folder / "logs").mkdir()
        assert sweep(cache, path, "k=2").heads[0].error is None
        shutil.rmtree(path)


def test_an_interrupted_sweep_keeps_what_is_complete(cache: Cache, tmp_path: Path) -> None:
    class Pressed(KeyboardInterrupt):
        pass

    def press(event: SweepProgress) -> None:
        if event.done == 2:
            raise Pressed

    with pytest.raises(Pressed):
        sweep(cache, tmp_path / "sweep", "k=1,2,3 seed=0:2", on_progress=press, jobs=1)
    done = list((tmp_path / "sweep").glob("runs/*/metrics.json"))
    assert len(done) == 2
    assert all(load_run(path.parent).path == path.parent for path in done)
    assert len(sweep(cache, tmp_path / "sweep", "k=1,2,3 seed=0:2").heads) == 6


def members(count: int, **options: Any) -> list[Member]:
    shape = build_head(HeadConfig(p=4), d=7, users=5)
    config = FitConfig(batch_size=16, epochs=2, evaluations=2, **options)
    return [Member(shape, replace(config, seed=seed)) for seed in range(count)]


def test_groups_fit_the_memory_and_keep_jobs_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(60, 5, 7)
    assert plan_stacks(members(40), data) == [list(range(40))]
    assert [len(stack) for stack in plan_stacks(members(40), data, jobs=2)] == [20, 20]
    assert [len(stack) for stack in plan_stacks(members(10), data, jobs=4)] == [5, 5]
    monkeypatch.setattr(stack_plans, "HEADS_ON_CPU", 16)
    assert [len(stack) for stack in plan_stacks(members(40), data)] == [13, 13, 14]
    monkeypatch.setattr(stack_plans, "HEADS_PER_JOB", 40)
    monkeypatch.setattr(stack_plans, "HEADS_ON_CPU", 40)
    monkeypatch.setattr(stack_plans, "free_memory", lambda device: 640_000 if device.type == "cpu" else 160_000)
    alone = len(plan_stacks(members(40), data))
    assert len(plan_stacks(members(40), data, jobs=4)) >= 4 * alone
    assert len(plan_stacks(members(40), data, jobs=4, devices=["cpu"] * 4)) == len(
        plan_stacks(members(40), data, jobs=4)
    )
    assert len(plan_stacks(members(40), data, jobs=2, devices=["cpu", "cuda:0"])) > 2 * alone
    monkeypatch.setattr(stack_plans, "free_memory", lambda _device: 1)
    assert [len(stack) for stack in plan_stacks(members(3), data)] == [1, 1, 1]


def test_without_memory_groups_are_halved_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = fit_stack

    def narrow(stack: Sequence[Member], *data: Any, **options: Any) -> Any:
        sizes.append(len(stack))
        if len(stack) > 2:
            raise torch.OutOfMemoryError
        return original(stack, *data, **options)

    monkeypatch.setattr(stack_plans, "fit_stack", narrow)
    train, val = make_data(60, 5, 7), make_data(30, 5, 7)
    steps: list[int] = []
    with pytest.warns(PalcacheWarning, match="Not all heads of a kind fit the memory of cpu at once"):
        found = fit_members(members(8), train, val, on_steps=steps.append)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert len(found) == 8
    assert steps == [8, 16, 24, 32, 40, 48, 56, 64], "four pairs, two evaluations each, 8 steps a head"


def test_a_sweep_says_once_that_groups_are_smaller(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_data: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stack_plans, "fit_stack", full)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = sweep(cache, tmp_path / "sweep", "k=2,3 seed=0:3", jobs=2)
    assert [str(one.message).partition(" at once")[0] for one in said if one.category is PalcacheWarning] == [
        "Not all heads of a kind fit the memory of cpu"
    ]
    assert not result.failed


def test_an_error_of_one_job_stops_the_others(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []

    def broken(members: Sequence[Member], *data: Any, **options: Any) -> Any:
        begun.append(time.monotonic())
        if len(begun) == 2:
            raise ValueError("a mistake")
        time.sleep(0.3)
        return fit_members(members, *data, **options)

    monkeypatch.setattr(sweeps, "fit_members", broken)
    with pytest.raises(ValueError, match="a mistake"):
        sweep(cache, tmp_path / "sweep", "k=2,3,4,5,6", jobs=2)
    assert len(begun) == 2


def test_a_head_that_fits_no_memory_fails_alone(cache: Cache, tmp_path: Path) -> None:
    found = run_sweep(cache, tmp_path / "sweep", parse_grid(f"{QUICK} k=2".replace("p=4", "p=4,2000000")), device="cpu")
    assert [head.run is None for head in found.heads] == [False, True]
    assert found.heads[1].error == (
        "A head of p = 2000000 and batch_size = 32 does not fit the memory of cpu; lower p or batch_size."
    )


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            InputError,
            r"^A head of p = 4 and .* memory of cpu; lower p or",
        ),
        (MemoryError(), InputError, "does not fit the memory of cpu"),
        (
            LINALG_ERROR("not converged"),
            NumericsError,
            r"cannot be solved .*\(not converged\); choose another",
        ),
    ],
)
def test_what_breaks_one_head_is_its_error(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], message: str
) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise raised

    monkeypatch.setattr(stack_plans, "fit", broken)
    (found,) = fit_members(members(1), make_data(60, 5, 7), make_data(30, 5, 7))
    assert isinstance(found, kind)
    assert re.search(message, str(found))
    raised = ValueError("a mistake")
    with pytest.raises(ValueError, match="a mistake"):
        fit_members(members(1), make_data(60, 5, 7), make_data(30, 5, 7))


def test_new_users_are_adapted_on_every_head_that_can(tmp_path: Path) -> None:
    rows, encoder = planted_rows(users=12, per_user=40)
    new = [row for row in rows if row["user_id"] in {"user 10", "user 11"}]
    cache = make_cache(tmp_path / "cache", [row for row in rows if row not in new], encoder, name="seen")
    make_cache(tmp_path / "cache", [{k: v for k, v in row.items() if k != "split"} for row in new], encoder, name="new")
    cache = Cache(tmp_path / "cache")
    result = sweep(cache, tmp_path / "sweep", "k=1,2 seed=0:2", comparisons="seen")
    adapted = adapt_sweep(result, cache, "new", shots=(0, 5), draws=2, device="cpu")
    assert [name for name, _ in adapted.curves] == [head.name for head in result.heads[2:]]
    assert list(adapted.skipped) == [head.name for head in result.heads[:2]]
    lines = list(csv.DictReader((tmp_path / "sweep" / "new_users.csv").open()))
    assert [line["shots"] for line in lines] == ["0", "5"]
    assert all(line["heads"] == "2" for line in lines)
    assert adapted.to_dict()["curve"]["5"]["mean"] == pytest.approx(float(lines[1]["accuracy_mean"]))
    blind = sweep(cache, tmp_path / "blind", "k=1", comparisons="seen")
    with pytest.raises(InputError, match="Users cannot be adapted on any head"):
        adapt_sweep(blind, cache, "new", device="cpu")
