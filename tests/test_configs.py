"""Configurations refuse what cannot work, and say which key of which file it was."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from palcache.choices import PROJECTOR
from palcache.configs import (
    MIN_EPOCHS,
    MIN_STEPS,
    Config,
    EmbedConfig,
    FitConfig,
    HeadConfig,
    SplitConfig,
    read_config_file,
    read_toml,
)
from palcache.errors import InputError

STAGES: tuple[type[Config], ...] = (SplitConfig, EmbedConfig, HeadConfig, FitConfig)
CHANGED: tuple[Config, ...] = (
    SplitConfig(by="prompt", val=0.2, test=0.3, seed=5),
    EmbedConfig(model="folder/model", revision="main", trust_remote_code=True, dtype="bfloat16", max_tokens=7),
    HeadConfig(k=3, p=None, projector="mlp1-gelu-dropout05-residual-nobias", temperature=0.5),
    FitConfig(batch_size=11, epochs=13, lr=0.0, lr_users=1, patience=0, seed=2**32 - 1),
)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "stage.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("config", [*(stage() for stage in STAGES), *CHANGED], ids=repr)
def test_to_dict_round_trips_through_json(config: Config) -> None:
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert type(config).from_mapping(values) == config


@pytest.mark.parametrize("stage", STAGES)
def test_configurations_are_frozen_and_keyword_only(stage: type[Any]) -> None:
    config = stage()
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        setattr(config, dataclasses.fields(stage)[0].name, 3)
    with pytest.raises(TypeError, match="positional argument"):
        stage(1)


def test_from_toml_reads_and_overrides_win(tmp_path: Path) -> None:
    path = toml(tmp_path, 'k = 5\nprojector = "identity"\ntemperature = 2\n')
    assert HeadConfig.from_toml(path) == HeadConfig(k=5, projector="identity", temperature=2)
    assert HeadConfig.from_toml(path, k=3, p=None) == HeadConfig(k=3, projector="identity", temperature=2)


def test_from_options_takes_none_as_the_default() -> None:
    assert FitConfig.from_options(lr=0.5, epochs=None, patience=0) == FitConfig(lr=0.5, patience=0)
    with pytest.raises(InputError, match=r"^options: lr = 'fast'; expected a number\.$"):
        FitConfig.from_options(lr="fast")


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        (HeadConfig, "temprature = 1", "unknown key temprature; did you mean temperature?"),
        (FitConfig, "lr_user = 1", "unknown key lr_user; did you mean lr_users?"),
        (EmbedConfig, 'modell = "minilm"', "unknown key modell; did you mean model?"),
        (SplitConfig, "zzz = 1", "unknown key zzz; the keys are by, val, test, seed."),
        (HeadConfig, "[heads]\nk = 3", "unknown key heads; did you mean head?"),
        (HeadConfig, 'k = "3"', "k = '3'; expected a whole number."),
        (HeadConfig, "k = 3.0", "k = 3.0; expected a whole number."),
        (HeadConfig, "k = true", "k = True; expected a whole number."),
        (HeadConfig, 'p = "wide"', "p = 'wide'; expected a whole number."),
        (HeadConfig, "temperature = false", "temperature = False; expected a number."),
        (HeadConfig, "projector = 2", "projector = 2; expected a text."),
        (EmbedConfig, "trust_remote_code = 1", "trust_remote_code = 1; expected true or false."),
        (EmbedConfig, "revision = 1", "revision = 1; expected a text."),
        (EmbedConfig, 'dtype = "int4"', "dtype = 'int4'; expected one of float16, bfloat16, float32, int8."),
        (SplitConfig, 'by = "users"', "by = 'users'; expected one of auto, row, pair, prompt, user, column."),
        (SplitConfig, "by = [1]", "by = [1]; expected one of auto"),
        (HeadConfig, "k = 0", "Got k = 0; expected at least one prototype."),
    ],
)
def test_from_toml_names_the_file_and_the_key(tmp_path: Path, stage: type[Config], text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}/stage\.toml: {re.escape(message)}"):
        stage.from_toml(toml(tmp_path, text))


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        (SplitConfig, {"val": 1.0}, r"Got val = 1.0 and test = 0.1; expected shares in \[0, 1\)"),
        (SplitConfig, {"val": 0.5, "test": 0.5}, "that leave something for training"),
        (SplitConfig, {"test": -0.1}, "test = -0.1"),
        (SplitConfig, {"val": math.nan}, "val = nan"),
        (SplitConfig, {"seed": -1}, r"Got seed = -1; expected a whole number in \[0, 2\*\*32\)"),
        (EmbedConfig, {"model": ""}, "Got an empty model; expected minilm"),
        (EmbedConfig, {"shard_rows": 0}, "Got shard_rows = 0; expected at least 1"),
        (EmbedConfig, {"max_tokens": 0}, "Got max_tokens = 0; expected at least 1"),
        (EmbedConfig, {"token_budget": -5}, "Got token_budget = -5; expected at least 1"),
        (HeadConfig, {"k": 0}, "Got k = 0; expected at least one prototype"),
        (HeadConfig, {"p": 0}, "Got p = 0; expected a width of at least 1"),
        (HeadConfig, {"temperature": 0.0}, "Got temperature = 0.0; expected a finite number above 0"),
        (HeadConfig, {"temperature": math.inf}, "Got temperature = inf; expected a finite number"),
        (HeadConfig, {"temperature": math.nan}, "Got temperature = nan; expected a finite number"),
        (HeadConfig, {"projector": "mlp"}, "Got the projector 'mlp'; expected identity or mlp{L}"),
        (FitConfig, {"batch_size": 0}, "Got batch_size = 0; expected at least 1"),
        (FitConfig, {"epochs": 0}, "Got epochs = 0; expected at least 1"),
        (FitConfig, {"evaluations": 0}, "Got evaluations = 0; expected at least 1"),
        (FitConfig, {"patience": -1}, "Got patience = -1; expected 0"),
        (FitConfig, {"warmup": 1.0}, r"Got warmup = 1.0; expected a share in \[0, 1\)"),
        (FitConfig, {"seed": 2**32}, "Got seed = 4294967296; expected a whole number"),
        (FitConfig, {"lr": -1e-3}, "Got lr = -0.001; expected a finite number of at least 0"),
        (FitConfig, {"lr_users": math.inf}, "Got lr_users = inf; expected a finite number"),
        (FitConfig, {"lr_scale": math.nan}, "Got lr_scale = nan; expected a finite number"),
        (FitConfig, {"weight_decay": -1}, "Got weight_decay = -1; expected a finite number"),
    ],
)
def test_values_that_cannot_work_are_refused(stage: type[Config], values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stage(**values)
    with pytest.raises(InputError, match=rf"^head\.json: .*{message}"):
        stage.from_mapping(values, origin="head.json")


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("identity", True),
        ("mlp2-relu-dropout1", True),
        ("mlp0-linear-dropout0", True),
        ("mlp12-gelu-dropout05-residual-nobias", True),
        ("mlp2-relu", False),
        ("mlp2-tanh-dropout1", False),
        ("mlp2-relu-dropout1-nobias-residual", False),
        ("mlp2-relu-dropout1\n", False),
        ("Identity", False),
    ],
)
def test_the_projector_grammar(name: str, valid: bool) -> None:
    assert (PROJECTOR.fullmatch(name) is not None) == valid


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stage\.toml is not TOML: .*line 2"):
        read_toml(toml(tmp_path, "k = 3\nk: 4\n"))
    (tmp_path / "stage.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(InputError, match=r"stage\.toml is not TOML: .*utf-8"):
        read_toml(tmp_path / "stage.toml")
    with pytest.raises(InputError, match=r"none\.toml cannot be read \(No such file or directory\)"):
        HeadConfig.from_toml(tmp_path / "none.toml")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        HeadConfig.from_toml(tmp_path)


SECTIONS: dict[str, type[Config]] = {"head": HeadConfig, "fit": FitConfig}


def test_a_flat_file_is_sorted_into_its_stages(tmp_path: Path) -> None:
    stages = read_config_file(toml(tmp_path, "k = 3\nlr = 1e-3\nseed = 7\np = 5\n"), SECTIONS)
    assert stages == {"head": {"k": 3, "p": 5}, "fit": {"lr": 1e-3, "seed": 7}}
    assert read_config_file(toml(tmp_path, ""), SECTIONS) == {"head": {}, "fit": {}}


def test_the_stages_of_a_flat_file_share_no_key() -> None:
    names = [field.name for stage in (HeadConfig, FitConfig) for field in dataclasses.fields(stage)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key epoch; did you mean epochs?"),
        ("zzz = 3", "unknown key zzz; the keys are k, p, projector, temperature, head, score"),
        ('lr = "fast"', "lr = 'fast'; expected a number."),
        ("k = 0", "Got k = 0; expected at least one prototype."),
    ],
)
def test_a_flat_file_names_itself_in_its_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"stage\.toml: {re.escape(message)}"):
        read_config_file(toml(tmp_path, text), SECTIONS)


@pytest.mark.parametrize("comparisons", [1, 255, 256, 257, 7_000, 10_000, 100_000, 1_000_000])
def test_epochs_none_makes_enough_steps(comparisons: int) -> None:
    """The least number of epochs that makes `MIN_STEPS` steps, and never fewer than `MIN_EPOCHS`."""
    config = FitConfig(batch_size=256)
    epochs, steps = config.total_epochs(comparisons), math.ceil(comparisons / 256)
    assert epochs >= MIN_EPOCHS
    assert epochs * steps >= MIN_STEPS
    assert epochs == MIN_EPOCHS or (epochs - 1) * steps < MIN_STEPS


def test_epochs_given_are_kept() -> None:
    assert FitConfig(epochs=3).total_epochs(1_000_000) == 3
