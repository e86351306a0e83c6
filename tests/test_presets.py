"""Presets build the published heads: widths, projectors, rates and numbers of learned parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from palcache.errors import InputError
from palcache.heads import build_head, parameter_count
from palcache.presets import load_preset, preset_names
from tests.building import generator

PUBLISHED = {"pal-b-tiny-opt350m-k1": 1_575_947, "pal-b-tiny-opt350m-k2": 2_363_925}
WIDTHS = {
    "facebook/opt-350m": 512,
    "distilbert/distilbert-base-cased": 768,
    "BAAI/bge-m3": 1024,
    "dunzhang/stella_en_1.5B_v5": 1536,
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": 1536,
}


def count(name: str, users: int = 10) -> int:
    preset = load_preset(name)
    shape = build_head(preset.head_config(), d=preset.width, users=users)
    return parameter_count(shape, shape.initial(generator(0)))


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_numbers_of_parameters(name: str, parameters: int) -> None:
    assert count(name) == parameters


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds(name: str) -> None:
    preset = load_preset(name)
    assert WIDTHS.get(preset.encoder, preset.width) == preset.width == preset.head["p"]
    layers = 3 * (preset.width**2 + preset.width)  # mlp2: three linear layers with biases, no batchnorm
    k, users = preset.head["k"], 10
    if preset.head["head"] == "pal-b":
        assert count(name) == (1 + k) * layers + users * k + 1
    else:
        assert count(name) == layers + k * preset.width + users * k
    fit = preset.fit_config()
    assert (fit.batch_size, fit.optimizer, fit.schedule, fit.warmup) == (4, "adam", "constant", 0)
    assert (fit.lr, fit.weight_decay, fit.lr_users, fit.lr_prototypes, fit.lr_scale) == (1e-4, 0.01, 5e-3, 5e-3, 0.1)


def test_every_encoder_has_one_and_two_prototypes() -> None:
    found = {(p.encoder, p.head["k"]) for p in map(load_preset, preset_names()) if p.head["head"] == "pal-b"}
    assert {(encoder, k) for encoder in WIDTHS for k in (1, 2)} <= found


def test_an_unknown_preset() -> None:
    with pytest.raises(InputError, match="did you mean pal-b-tiny-opt350m-k2"):
        load_preset("pal-b-tiny-opt350-k2")
    with pytest.raises(InputError, match="palcache presets lists them"):
        load_preset("xyz")


def test_the_command_lists_them() -> None:
    palcache = Path(sys.executable).with_name("palcache")
    shown = subprocess.run([palcache, "presets"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in preset_names())
    listed = subprocess.run([palcache, "presets", "--json"], capture_output=True, text=True, check=True).stdout
    assert [p["name"] for p in json.loads(listed)["presets"]] == preset_names()
