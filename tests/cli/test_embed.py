"""`palcache embed`: tables become a cache, what is there is not encoded again, and a plan writes nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from palcache.cache import Cache
from tests.cli.conftest import Invoke
from tests.conftest import ROOT
from tests.stubs import contents

SAMPLE = ROOT / "data" / "sample.jsonl"
pytestmark = pytest.mark.usefixtures("sample_cache")  # skips where the bundled model is missing


def lines(count: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:count]]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Return thirty comparisons, too few to be split."""
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps({**row, "split": "train"}) + "\n" for row in lines(30)), encoding="utf-8")
    return path


def test_json_is_one_object_and_talk_goes_to_stderr(invoke: Invoke, table: Path, tmp_path: Path) -> None:
    result = invoke("embed", table, "--cache", tmp_path / "cache", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert (summary["references"], summary["hits"], summary["plan"]) == (90, 0, False)
    assert summary["encoded"] == sum(summary["distinct"].values())
    assert summary["repeats_saved"] == 90 - summary["encoded"]
    assert {"read", "model", "forward", "total"} <= summary["seconds"].keys()
    assert "embed: 100%" in result.stderr
    assert "tokens/s" in result.stderr
    assert Cache(tmp_path / "cache").comparison_names == ["small"]


def test_a_second_time_encodes_nothing(invoke: Invoke, table: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = invoke("embed", table, "--cache", cache)
    assert first.exit_code == 0, first.stderr
    assert " encoded, " in first.stdout
    assert "next: palcache train-head" in first.stderr
    before = contents(cache)
    again = json.loads(invoke("embed", table, "--cache", cache, "--json").stdout)
    assert again["encoded"] == 0
    assert again["hits"] == sum(again["distinct"].values())
    assert contents(cache) == before


def test_a_plan_counts_and_writes_nothing(invoke: Invoke, table: Path, tmp_path: Path) -> None:
    result = invoke("embed", table, "--cache", tmp_path / "cache", "--plan", "--json")
    plan = json.loads(result.stdout)
    assert result.exit_code == 0
    assert plan["plan"] is True
    assert plan["encoded"] == sum(plan["distinct"].values()) > 0
    assert plan["new_bytes"] > 0
    assert not (tmp_path / "cache").exists()
    text = invoke("embed", table, "--cache", tmp_path / "cache", "--plan").stdout
    assert f"plan for {tmp_path / 'cache'}" in text
    assert f"{plan['encoded']:,} to encode" in text


def test_csv_columns_are_mapped_and_trl_rows_are_read(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["worker", "prompt", "chosen", "rejected"])
        writer.writerows([row["user_id"], row["prompt"], row["response_1"], row["response_2"]] for row in lines(12))
    options = ("--cache", tmp_path / "cache", "--split-by", "row", "--val", 0, "--test", 0)
    refused = invoke("embed", path, *options)
    assert refused.exit_code == 2
    assert "lacks the column(s) user_id" in refused.stderr
    assert "--map" in refused.stderr
    result = invoke("embed", path, *options, "--map", "user_id=worker", "--name", "mapped", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    stored = Cache(tmp_path / "cache").comparisons("mapped")
    assert stored.comparisons.users.values.to_pylist() == ["adventurous-00"]
    assert stored.about["split"]["seed"] == 3
    assert set(stored.comparisons.y.tolist()) == {-1, 1}


@pytest.mark.parametrize(("policy", "kept"), [("drop", 29), ("half", 30)])
def test_ties_follow_the_policy(invoke: Invoke, tmp_path: Path, policy: str, kept: int) -> None:
    path = tmp_path / "ties.jsonl"
    rows = [{**row, "split": "train", "y": 0 if at == 4 else row["y"]} for at, row in enumerate(lines(30))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    refused = invoke("embed", path, "--cache", tmp_path / "cache")
    assert refused.exit_code == 2
    assert "line 5: has y = 0, a tie" in refused.stderr
    assert "--ties drop or --ties half" in refused.stderr
    assert invoke("embed", path, "--cache", tmp_path / "cache", "--ties", policy).exit_code == 0
    assert len(Cache(tmp_path / "cache").comparisons().comparisons) == kept


def test_what_is_left_out_is_a_warning_on_stderr(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    rows = [{**row, "split": "train"} for row in lines(5)]
    rows[2]["response_2"] = rows[2]["response_1"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = invoke("embed", path, "--cache", tmp_path / "cache", "--json")
    assert result.exit_code == 0
    assert "Warning: " in result.stderr
    assert "line 3: two identical responses hold no preference" in result.stderr
    assert json.loads(result.stdout)["references"] == 12


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing.jsonl"], 2, "nothing.jsonl does not exist"),
        (["SAMPLE", "--map", "user_id"], 2, "Got --map 'user_id'; expected NAME=COLUMN"),
        (["SAMPLE", "--val", "0.7", "--test", "0.7"], 2, "val = 0.7"),
        (["SAMPLE", "--split-by", "column"], 2, "--split-by column was asked, but the table has no column split"),
        (["SAMPLE", "--shard-rows", "0"], 2, "shard_rows = 0"),
        (["SAMPLE", "--device", "abacus"], 2, "Got the device 'abacus'"),
        (["SAMPLE", "--model", "./no-such-model"], 2, "no-such-model"),
    ],
)
def test_wrong_input_is_one_sentence(
    invoke: Invoke, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    arguments = [str(SAMPLE) if argument == "SAMPLE" else argument for argument in arguments]
    result = invoke("embed", *arguments, "--cache", tmp_path / "cache")
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_folder_of_something_else_is_refused(invoke: Invoke, table: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    result = invoke("embed", table, "--cache", tmp_path / "mine")
    assert result.exit_code == 2
    assert "exists and is not a cache" in result.stderr
    assert contents(tmp_path / "mine") == {"thesis.txt": b"mine"}
