"""`palcache demo`: the whole job, and what pluralism bought."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palcache.runs.trainings import load_run
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("sample_cache")  # skips where the bundled model is missing


def test_the_demo_shows_what_pluralism_bought_and_keeps_its_runs(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = invoke("demo", "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    one, two = (load_run(out / name).evaluations["test"]["head"].accuracy["micro"].value for name in ("k1", "k2"))
    assert two > one + 0.15
    assert f"{100 * (two - one):+.1f} percentage points" in result.stdout
    for words in ("two prototypes (k = 2)", "adventurous-00", "homely-07", "accuracy by group"):
        assert words in result.stdout
    assert f"kept in {out}" in result.stderr
    assert "the whole demo took" in result.stderr
    again = invoke("demo", "--out", out)
    assert again.exit_code == 2
    assert f"{out} exists; name a new folder with --out" in again.stderr


def test_json_is_one_object(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, sample_cache: Path, tmp_path: Path
) -> None:
    """The model is not run again: the demo finds the sample's vectors in its cache."""
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(
        "palcache.embedding.stages.embed_tables", lambda *_args, **_options: _summary(sample_cache, tmp_path / "demo")
    )
    result = invoke("demo", "--out", tmp_path / "demo", "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert values.keys() == {"seconds", "k1", "k2"}
    assert values["k2"]["test"]["accuracy"]["micro"] > values["k1"]["test"]["accuracy"]["micro"]


def _summary(cache: Path, out: Path) -> object:
    from palcache.embedding.encoding import EmbedSummary

    (out / "cache").symlink_to(cache)
    return EmbedSummary(references=1, encoded=1, seconds={"total": 0.0})
