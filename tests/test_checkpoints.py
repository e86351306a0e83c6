"""A head comes back as it was, whatever its users are called; a damaged file is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from palcache.checkpoints import FitState, HistoryRow, TrainedHead, load_head, read_state, save_head, write_state
from palcache.errors import CacheError
from palcache.heads import PalB
from tests.worlds import random_head

ODD_USERS = (
    "seen.3",
    "a/b\\c",
    "",
    " ",
    "\u00e4\U0001f600 \u202e",
    "line\nbreak",
    "nul\0byte",
    "user.logits",
    "../../etc",
)


@given(users=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6, unique=True))
def test_any_user_id_comes_back(users: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_head(path, random_head(users, d=5, k=2, p=3))
    assert load_head(path).users == tuple(users)


def test_a_head_comes_back_whole(tmp_path: Path) -> None:
    head = random_head(ODD_USERS, d=6, about={"seed": 3, "table": {"name": "\u00fc.x"}})
    save_head(tmp_path / "head.safetensors", head)
    again = load_head(tmp_path / "head.safetensors")
    assert again.shape == head.shape
    assert again.users == ODD_USERS
    assert again.about == head.about
    assert again.parameters.keys() == head.parameters.keys()
    assert all(torch.equal(again.parameters[name], value) for name, value in head.parameters.items())
    assert torch.equal(again.mixtures, head.mixtures)
    assert again.mixtures.shape == (len(ODD_USERS), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]


def test_the_same_head_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_head(tmp_path / name, random_head(["a", "b"], d=6, about={"b": 1, "a": 2}))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    save_head(tmp_path / "two", random_head(["a", "c"], d=6, about={"b": 1, "a": 2}))
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_views_and_gradients_are_saved_as_plain_values(tmp_path: Path) -> None:
    head = random_head(["a", "b"], d=6)
    turned = {name: value.clone().requires_grad_() for name, value in head.parameters.items()}
    turned["f.0.weight"] = head.parameters["f.0.weight"].T.contiguous().T
    save_head(tmp_path / "head", TrainedHead(head.shape, turned, head.users, {}))
    again = load_head(tmp_path / "head").parameters
    assert torch.equal(again["f.0.weight"], head.parameters["f.0.weight"])
    assert not any(value.requires_grad for value in again.values())


def test_to_moves_the_parameters() -> None:
    head = random_head(["a", "b"], d=6)
    moved = head.to(torch.device("meta"))
    assert {value.device.type for value in moved.parameters.values()} == {"meta"}
    assert (moved.users, moved.shape) == (head.users, head.shape)


def described(path: Path) -> dict[str, Any]:
    """Return what a file says of itself in its one entry of metadata."""
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert list(metadata) == ["palcache"]
    out: dict[str, Any] = json.loads(metadata["palcache"])
    return out


def test_the_file_names_the_shape_and_the_format(tmp_path: Path) -> None:
    """The layout is read by others: names and metadata are part of the format."""
    path = tmp_path / "head"
    save_head(path, random_head(["a", "bc"], d=6, about={"seed": 3}))
    tensors = load_file(path)
    assert {
        "f.0.weight",
        "g.1.bias",
        "user.logits",
        "logit_scale",
        "user.id.bytes",
        "user.id.offsets",
    } <= tensors.keys()
    assert bytes(tensors["user.id.bytes"].tolist()) == b"abc"
    assert tensors["user.id.offsets"].tolist() == [0, 1, 3]
    shape = {"head": "pal-b", "d": 6, "p": 4, "k": 3, "users": 2, "projector": "mlp1-gelu-dropout2", "temperature": 0.7}
    assert described(path) == {"format": "palcache-head", "version": 1, "shape": shape, "about": {"seed": 3}}


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"nothing cannot be read as a head \(.*\); train it again"):
        load_head(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "head"
    save_head(path, random_head(["a", "b"], d=6))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match="cannot be read as a head"):
        load_head(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "of format other version 1; expected palcache-head 1"),
        ({"version": 2}, "of format palcache-head version 2; expected palcache-head 1"),
        ({"shape": []}, "is damaged: its content is not that of a head"),
        ({"shape": {"head": "pal-a"}}, "head: The head of kind pal-a has a shape that this version does not know"),
        (
            {"shape": {"head": "pal-b", "d": 6}},
            "head: The head of kind pal-b has a shape that this version does not know",
        ),
        ({"shape": {"head": "pal-z"}}, "head: The head is of kind 'pal-z'; this version of palcache knows pal-b"),
    ],
)
def test_other_metadata_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "head"
    save_head(path, random_head(["a", "b"], d=6))
    save_file(load_file(path), path, {"palcache": json.dumps(described(path) | change)})
    with pytest.raises(CacheError, match=message):
        load_head(path)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_nonsense_metadata_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "head", {"palcache": text})
    with pytest.raises(CacheError, match="head is damaged: its content is not that of a head"):
        load_head(tmp_path / "head")


@pytest.mark.parametrize("name", ["f.0.weight", "user.logits", "user.id.bytes", "user.id.offsets"])
@pytest.mark.parametrize("missing", [False, True])
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, *, missing: bool) -> None:
    path = tmp_path / "head"
    save_head(path, random_head(["a", "b"], d=6))
    tensors = load_file(path)
    tensors[name] = torch.full((1, 1), 250, dtype=torch.uint8)
    if missing:
        del tensors[name]
    save_file(tensors, path, {"palcache": json.dumps(described(path))})
    with pytest.raises(CacheError, match="is damaged"):
        load_head(path)


def test_a_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CacheError, match="of format None version None; expected palcache-head 1"):
        load_head(tmp_path / "other")


def test_a_projector_that_does_not_fit_its_widths_is_refused(tmp_path: Path) -> None:
    head = random_head(["a", "b"], d=6)
    assert isinstance(head.shape, PalB)
    wrong = replace(head.shape, projector="identity")
    save_head(tmp_path / "head", TrainedHead(wrong, head.parameters, head.users, {}))
    with pytest.raises(CacheError, match=r"is damaged: .*identity needs d = p"):
        load_head(tmp_path / "head")


def some_state() -> FitState:
    now, best = (random_head(["a", "b"], d=6, seed=seed).parameters for seed in (1, 2))
    moments = {f"{name}/exp_avg": value / 3 for name, value in now.items()} | {"logit_scale/step": torch.tensor(7.0)}
    rows = (HistoryRow(3, 0.75, 0.1 + 0.2, 1 / 3, 0.5, 1e-3, 14.3), HistoryRow(7, 1.75, 0.1, 0.2, 0.625, 1e-17, 15.0))
    return FitState(7, now, best, moments, rows)


def test_a_state_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    state = some_state()
    write_state(tmp_path / "state", state)
    again = read_state(tmp_path / "state")
    assert again is not None
    assert (again.step, again.history) == (state.step, state.history)
    for old, new in ((state.parameters, again.parameters), (state.best, again.best), (state.moments, again.moments)):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], value) for name, value in new.items())


def test_a_state_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_state(tmp_path / "nothing") is None
    write_state(tmp_path / "state", some_state())
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:-9])
    assert read_state(tmp_path / "cut") is None
    save_file({"now/a": torch.zeros(1)}, tmp_path / "other")
    assert read_state(tmp_path / "other") is None
