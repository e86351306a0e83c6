"""`palcache train-head`: a run folder from a cache, with options from the command line and a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.worlds import files_of, make_cache, planted_rows

QUICK = ("--p", 4, "--projector", "mlp0-linear-dropout0", "--epochs", 2, "--batch-size", 64, "--device", "cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache of a planted world."""
    return make_cache(tmp_path_factory.mktemp("train-head") / "cache", *planted_rows()).path


def test_json_has_the_promised_keys_and_nothing_else_is_on_stdout(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    result = invoke("train-head", cache, "--run", tmp_path / "run", *QUICK, "--k", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    values = json.loads(result.stdout)
    assert values["run"] == str(tmp_path / "run")
    assert values["seconds"] > 0
    for split in ("test", "val"):
        assert values[split]["n"] > 0
        assert 0 <= values[split]["accuracy"]["macro"] <= 1
        assert len(values[split]["accuracy"]["interval"]["micro"]) == 2
        for rule in ("user_blind", "longer"):
            assert values["yardsticks"][rule][split]["n"] == values[split]["n"]
    written = json.loads((tmp_path / "run" / "metrics.json").read_bytes())
    assert written["test"] == values["test"]
    assert "train:" in result.stderr
    assert "comparisons/s" in result.stderr


def test_people_read_tables_with_the_yardsticks_beside(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    result = invoke("train-head", cache, "--run", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.stderr
    for words in (
        "PAL-B (k = 2)",
        "user-blind (k = 1)",
        "longer response",
        "95 % interval",
        "no ties",
        "val: ",
        "test: ",
    ):
        assert words in result.stdout
    assert "chose step" in result.stderr
    assert "yardstick k = 1: " in result.stderr
    again = invoke("train-head", cache, "--run", tmp_path / "run", *QUICK, "--resume")
    assert again.exit_code == 0
    assert again.stdout == result.stdout
    assert "was complete; nothing was trained" in again.stderr


def test_the_same_command_gives_the_same_bytes(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        seed = 5 if name == "three" else 4
        assert invoke("train-head", cache, "--run", tmp_path / name, *QUICK, "--seed", seed).exit_code == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    head = "head.safetensors"
    assert files_of(tmp_path / "one")[head] != files_of(tmp_path / "three")[head]


def test_a_file_gives_options_and_the_command_line_wins(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(
        'k = 3\np = 5\nlr = 0.02\nlr_users = 1\nevaluations = 2\nprojector = "mlp0-linear-dropout0"\nepochs = 1\n'
    )
    result = invoke("train-head", cache, "--run", tmp_path / "run", "--config", path, "--p", 4, "--lr", 0.03)
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_bytes())
    assert config["head"] == {"k": 3, "p": 4, "projector": "mlp0-linear-dropout0", "temperature": 1.0}
    fit = config["fit"]
    assert (fit["lr"], fit["lr_users"], fit["evaluations"], fit["epochs"], fit["batch_size"]) == (0.03, 1, 2, 1, 256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kk = 3\n", "options.toml: unknown key kk; did you mean k?"),
        ("[head]\nk = 3\n", "options.toml: head = {'k': 3}; expected one of pal-b, pal-a"),
        ('k = "three"\n', "options.toml: k = 'three'; expected a whole number"),
        ("k = 0\n", "k = 0; expected at least one prototype"),
        ("k = \n", "options.toml is not TOML"),
        ("lr = -1\n", "lr = -1"),
    ],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(
    invoke: Invoke, cache: Path, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "options.toml"
    path.write_text(content)
    result = invoke("train-head", cache, "--run", tmp_path / "run", "--config", path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(path) in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--k", 0], 2, "Got k = 0; expected at least one prototype"),
        (
            ["--projector", "mlp2"],
            2,
            "expected identity or mlp{L}-{relu|gelu|linear}-dropout{D}[-residual][-batchnorm][-nobias]",
        ),
        (["--projector", "identity", "--p", 4], 2, "identity needs d = p: choose --p 10"),
        (["--comparisons", "other"], 2, "no comparison table other; it has table"),
        (["--space", "other"], 2, "choose one with --space"),
        (["--config", "missing.toml"], 2, "missing.toml cannot be read"),
        (["--device", "cuda:99"], 2, "cuda:99 is not on this machine"),
        (["--lr", "1e30"], 1, "lower --lr"),
    ],
)
def test_wrong_options_are_one_sentence_and_leave_no_folder(
    invoke: Invoke, cache: Path, tmp_path: Path, options: list[object], code: int, message: str
) -> None:
    result = invoke("train-head", cache, "--run", tmp_path / "run", *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_existing_run_needs_resume_and_the_same_options(invoke: Invoke, cache: Path, tmp_path: Path) -> None:
    command = ("train-head", cache, "--run", tmp_path / "run", *QUICK)
    assert invoke(*command).exit_code == 0
    refused = invoke(*command)
    assert refused.exit_code == 2
    assert "continue it with --resume" in refused.stderr
    other = invoke(*command, "--k", 4, "--resume")
    assert other.exit_code == 2
    assert "head.k = 2, asked now: 4" in other.stderr
    assert invoke(*command, "--resume").exit_code == 0


def test_strangers_are_refused_dropped_or_scored(invoke: Invoke, tmp_path: Path) -> None:
    rows, encoder = planted_rows()
    rows = [{**row, "user_id": "new"} if row["split"] == "test" and at % 2 else row for at, row in enumerate(rows)]
    cache = make_cache(tmp_path / "cache", rows, encoder).path
    command = ("train-head", cache, *QUICK, "--json")
    refused = invoke(*command, "--run", tmp_path / "refused")
    assert refused.exit_code == 2
    assert "--unknown-users generic" in refused.stderr
    n = {}
    for policy in ("generic", "drop"):
        result = invoke(*command, "--run", tmp_path / policy, "--unknown-users", policy)
        n[policy] = json.loads(result.stdout)["test"]["n"]
    assert n["generic"] > n["drop"] > 0
