"""Grids say which heads a sweep trains, and name what is wrong with them."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from palcache.errors import InputError
from palcache.recipes import load_recipe, recipe_names
from palcache.sweeps.grids import Grid, configs_of, grid_of, parse_grid, read_grid


def heads(text: str) -> list[dict[str, Any]]:
    return list(grid_of(tomllib.loads(text), origin="file").heads())


def test_every_combination_is_one_head_and_the_last_option_varies_fastest() -> None:
    found = list(parse_grid("k=1,3 lr=1e-3,3e-4 seed=0:3").heads())
    assert len(found) == 12
    assert found[0] == {"k": 1, "lr": 0.001, "seed": 0}
    assert found[1] == {"k": 1, "lr": 0.001, "seed": 1}
    assert found[-1] == {"k": 3, "lr": 0.0003, "seed": 2}


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("k=1,2,5:8,2", "k", [1, 2, 5, 6, 7]),
        ("p=none,64", "p", [None, 64]),
        ("score=dist,none", "score", ["dist", None]),
        ("lr=1", "lr", [1.0]),
        ("user_form=f(Pw),|f(P)|w", "user_form", ["f(Pw)", "|f(P)|w"]),
        ("projector='mlp1-relu-dropout0',identity", "projector", ["mlp1-relu-dropout0", "identity"]),
        ("split_seed=0:2", "split_seed", [0, 1]),
    ],
)
def test_values_have_the_type_of_their_option(text: str, name: str, values: list[Any]) -> None:
    found = parse_grid(text).crossed[name]
    assert list(found) == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--grid: the grid is empty; expected options and values such as 'k=1,2"),
        ("kk=1", r"--grid: unknown key kk; did you mean k\?$"),
        ("sead=0:3", r"unknown key sead; did you mean seed\?$"),
        ("zzzzz=1", r"unknown key zzzzz; the keys are k, p, projector"),
        ("k=1 k=2", r"--grid: k is there twice; give its values in one list: k=A,B\.$"),
        ("k", r"got 'k'; expected name=value,value"),
        ("k=", r"got 'k='; expected name=value,value"),
        ("bogus=3", r"unknown key bogus; the keys are k, p, projector"),
        ("seed=0-4", r"seed=0-4; expected a whole number; for a range give seed=0:5, which leaves out its end\.$"),
        ("k=1..3", r"k=1\.\.3; expected a whole number; for a range give k=1:4, which leaves out its end\.$"),
        ("k=two", r"k=two; expected a whole number\.$"),
        ("lr=fast", r"lr=fast; expected a number\.$"),
        ("score=disp", r"score=disp; expected dist or dist_normalized or .* or none\.$"),
        ("seed=3:3", r"seed=3:3 holds no number; expected lo:hi with lo below hi"),
        ("k='1", r"cannot be read \(No closing quotation\)"),
    ],
)
def test_a_bad_text_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_grid(text)


FILE = """
[fixed]
p = 8
[grid]
k = [1, 2]
seed = "0:2"
[zip]
lr = [1e-3, 3e-4, 1]
weight_decay = [0.1, 0.2, 0.3]
[random]
count = 2
seed = 7
lr_users = { log = [0.01, 1.0] }
warmup = { uniform = [0.0, 0.5] }
batch_size = { integers = [8, 16] }
optimizer = ["adam", "adamw"]
"""


def test_a_file_fixes_crosses_zips_and_draws() -> None:
    found = heads(FILE)
    assert len(found) == 2 * 2 * 3 * 2
    assert {head["p"] for head in found} == {8}
    assert {(head["lr"], head["weight_decay"]) for head in found} == {(1e-3, 0.1), (3e-4, 0.2), (1.0, 0.3)}
    assert all(type(head["lr"]) is float for head in found)
    drawn = {(head["lr_users"], head["warmup"], head["batch_size"], head["optimizer"]) for head in found}
    assert len(drawn) == 2
    for lr_users, warmup, batch_size, optimizer in drawn:
        assert 0.01 <= lr_users <= 1
        assert 0 <= warmup <= 0.5
        assert 8 <= batch_size < 16
        assert optimizer in {"adam", "adamw"}
    assert heads(FILE) == found
    assert heads(FILE.replace("seed = 7", "seed = 8")) != found


def test_logarithms_are_uniform() -> None:
    found = heads("[random]\ncount = 400\nlr = { log = [1e-4, 1e-2] }")
    logs = sorted(math.log10(head["lr"]) for head in found)
    assert sum(value < -3 for value in logs) / 400 == pytest.approx(0.5, abs=0.1)
    assert -4 <= logs[0] < -3.9
    assert -2.1 < logs[-1] <= -2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"file: the grid is empty; give options and values under \[grid\]"),
        ("[gird]\nk = [1]", r"file: unknown section gird; did you mean grid\?$"),
        ("grid = 3", r"file: grid = 3; expected a section \[grid\]"),
        ("[grid]\nkk = [1]", r"file: unknown key kk; did you mean k\?$"),
        ("[grid]\nk = []", r"file: k has no values"),
        ("[grid]\nk = [1.5]", r"file: k = 1\.5; expected a whole number"),
        ("[grid]\nk = [true]", r"file: k = True; expected a whole number"),
        ("[grid]\nk = [1]\n[fixed]\nk = 2", r"file: k is in two sections"),
        ("[zip]\nk = [1, 2]\nlr = [0.1]", r"different lengths \(k 2, lr 1\)"),
        ("[random]\nlr = [0.1]", r"\[random\] needs count of at least 1"),
        ("[random]\ncount = 1\nlr = { log = [0, 1] }", r"lr = .* in \[random\]; expected a list to choose from"),
        ("[random]\ncount = 1\nk = { uniform = [0, 1] }", r"k = .* in \[random\]; expected a list"),
        ("[grid]\nk = [1]\n[new_users]\nshot = [1]", r"file: unknown key shot in \[new_users\]; did you mean shots\?$"),
        (
            "[grid]\nk = [1]\n[new_users]\nshots = [1, -1]",
            r"shots = \[1, -1\] in \[new_users\]; expected a list of whole",
        ),
        ("[grid]\nk = [1]\n[new_users]\nshots = 5", r"shots = 5 in \[new_users\]; expected a list of whole numbers"),
        ("[grid]\nk = [1]\n[new_users]\ndraws = '5'", r"draws = '5' in \[new_users\]; expected a whole number of at"),
        ("preset = 'pal-c'\n[grid]\nk = [1]", r"There is no preset pal-c"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        heads(text)


def test_a_preset_stands_behind_the_grid() -> None:
    found = heads('preset = "pal-b-tiny-opt350m-k2"\n[grid]\nk = [1, 3]\nbatch_size = [4, 8]')
    assert [(head["k"], head["batch_size"]) for head in found] == [(1, 4), (1, 8), (3, 4), (3, 8)]
    assert {head["optimizer"] for head in found} == {"adam"}


def test_the_command_line_wins_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(FILE)
    grid = read_grid(tmp_path / "sweep.toml").crossed_with(parse_grid("seed=5 p=4"))
    assert {head["seed"] for head in grid.heads()} == {5}
    assert {head["p"] for head in grid.heads()} == {4}
    with pytest.raises(InputError, match=r"--grid: lr is in \[zip\] of the file already"):
        read_grid(tmp_path / "sweep.toml").crossed_with(parse_grid("lr=1"))


def test_options_become_configurations() -> None:
    head, fit, seed = configs_of({"k": 3, "lr": 0.1, "split_seed": 4})
    assert (head.k, fit.lr, seed) == (3, 0.1, 4)
    with pytest.raises(InputError, match="Got k = 0; expected at least one prototype"):
        configs_of({"k": 0})
    with pytest.raises(InputError, match="Got split_seed = -1"):
        configs_of({"split_seed": -1})


def test_recipes_are_sweeps_of_the_published_experiments() -> None:
    assert recipe_names() == ["pal-few-shot", "pal-groups"]
    assert len(list(load_recipe("pal-groups").heads())) == 10
    few = load_recipe("pal-few-shot")
    assert len(list(few.heads())) == 5
    assert few.new_users["shots"][-1] == 100
    with pytest.raises(InputError, match=r"There is no recipe pal-group; did you mean pal-groups\?"):
        load_recipe("pal-group")


def test_an_empty_grid_is_one_head_of_defaults() -> None:
    assert list(Grid().heads()) == [{}]
