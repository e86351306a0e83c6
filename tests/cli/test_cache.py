"""`palcache cache`: what is in a cache, in full at any width, and whether its bytes are those that were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from palcache.cache import Cache
from tests.cli.conftest import Invoke
from tests.stubs import contents, flip_bit
from tests.worlds import make_cache, planted_rows


@pytest.fixture
def damaged(sample_cache: Path, tmp_path: Path) -> Path:
    """Return a copy of the sample's cache in which one bit of a vector is turned round."""
    path = tmp_path / "damaged"
    shutil.copytree(sample_cache, path)
    opened = Cache(path)
    shard = opened.space(opened.space_ids[0]).shards[0].path
    flip_bit(shard, shard.stat().st_size // 2)
    return path


def test_info_shows_every_column_in_full(invoke: Invoke, sample_cache: Path) -> None:
    """Not a terminal: nothing is cut, however narrow the environment says it is."""
    result = invoke("cache", "info", sample_cache)
    assert result.exit_code == 0, result.stderr
    for word in ("prompt", "response", "sentence-transformers/all-MiniLM-L6-v2", "float16", "float32", "sample"):
        assert word in result.stdout
    header = next(line for line in result.stdout.splitlines() if "space" in line and "model" in line)
    assert header.split() == [
        "space",
        "role",
        "model",
        "stored",
        "computed",
        "rows",
        "width",
        "MB",
        "shards",
        "unfinished",
    ]
    assert "\u2026" not in result.stdout
    table = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["sample"])
    assert table.split()[-4:] == ["960", "16", "24", "192"]
    assert result.stderr == ""


def test_info_as_json(invoke: Invoke, sample_cache: Path) -> None:
    result = invoke("cache", "info", sample_cache, "--json")
    info = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert info["path"] == str(sample_cache)
    assert {space["role"]: (space["rows"], space["width"]) for space in info["spaces"]} == {
        "prompt": (24, 384),
        "response": (192, 384),
    }
    (table,) = info["comparisons"]
    assert (table["name"], table["comparisons"], table["users"]) == ("sample", 960, 16)
    assert sum(table["splits"].values()) == 960
    assert table["spaces"] == [[space["space"] for space in sorted(info["spaces"], key=lambda s: str(s["role"]))]]


def test_info_of_an_empty_cache(invoke: Invoke, tmp_path: Path) -> None:
    Cache.create(tmp_path / "cache")
    result = invoke("cache", "info", tmp_path / "cache")
    assert result.exit_code == 0
    assert json.loads(invoke("cache", "info", tmp_path / "cache", "--json").stdout)["spaces"] == []


def test_info_of_a_table_without_splits(invoke: Invoke, tmp_path: Path) -> None:
    rows, encoder = planted_rows(per_user=3)
    make_cache(tmp_path / "cache", [{k: v for k, v in row.items() if k != "split"} for row in rows], encoder)
    info = json.loads(invoke("cache", "info", tmp_path / "cache", "--json").stdout)
    assert info["comparisons"][0]["splits"] == {}
    assert invoke("cache", "info", tmp_path / "cache").exit_code == 0


def test_a_sound_cache_is_said_to_be_sound_and_not_written(invoke: Invoke, sample_cache: Path) -> None:
    before = contents(sample_cache)
    result = invoke("cache", "verify", sample_cache)
    assert result.exit_code == 0
    assert f"{sample_cache}: sound: 216 rows in 2 shards" in result.stdout
    assert "verify: 100%" in result.stderr
    assert contents(sample_cache) == before


def test_verify_as_json_with_rows_encoded_again(invoke: Invoke, sample_cache: Path) -> None:
    result = invoke("cache", "verify", sample_cache, "--reencode", 5, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert (found["sound"], found["problems"], found["reencoded"], found["rows"]) == (True, [], 10, 216)
    assert 0.9999 < found["lowest_cosine"] <= 1.0001


def test_a_turned_bit_is_found_and_is_exit_code_1(invoke: Invoke, damaged: Path) -> None:
    result = invoke("cache", "verify", damaged)
    assert result.exit_code == 1
    assert "NOT sound" in result.stdout
    as_json = invoke("cache", "verify", damaged, "--json")
    found = json.loads(as_json.stdout)
    assert as_json.exit_code == 1
    assert found["sound"] is False
    assert len(found["problems"]) >= 1


def test_a_missing_shard_is_found(invoke: Invoke, damaged: Path) -> None:
    opened = Cache(damaged)
    opened.space(opened.space_ids[0]).shards[0].path.unlink()
    result = invoke("cache", "verify", damaged)
    assert result.exit_code == 1
    assert "is in the journal and not in its folder" in result.stdout


def test_another_model_is_refused_for_encoding_again(invoke: Invoke, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", *planted_rows(per_user=3))
    result = invoke("cache", "verify", tmp_path / "cache", "--reencode", 2)
    assert result.exit_code == 2
    assert "name the model, and the options that palcache embed had" in result.stderr
