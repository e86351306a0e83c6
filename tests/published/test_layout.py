"""The published checkpoints: in, out, and end to end from token ids."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palcache.checkpoints import TrainedHead, load_head
from palcache.configs import HeadConfig
from palcache.errors import InputError
from palcache.heads import PalA, PalB, build_head
from palcache.published.files import read_encoder, read_published, write_published
from palcache.published.layout import PublishedOptions, from_state, to_state
from palcache.published.scoring import score_token_ids
from palcache.runs.imported import export_checkpoint, import_checkpoint
from tests.building import generator

HEADS = Path(os.environ.get("PALCACHE_REFERENCE_DIR", Path(__file__).parents[3] / "shared" / "reference" / "heads"))
REFERENCE = HEADS.parent / "checkpoint"
needs_reference = pytest.mark.skipif(not (REFERENCE / "model.ckpt").is_file(), reason="needs PALCACHE_REFERENCE_DIR")


def trained(**options: Any) -> TrainedHead:
    users = ("alice", "bob.2", "c%2E", "日本")
    values: dict[str, Any] = {"k": 3, "p": 5, "projector": "mlp2-relu-dropout2", "start": "published"}
    config = HeadConfig(**(values | options))
    shape = build_head(config, d=7, users=len(users))
    return TrainedHead(shape, shape.initial(generator(0)), users, {})


def without_layers(head: TrainedHead) -> str | None:
    name = getattr(head.shape, "projector", None)
    return name if name == "identity" else None


@needs_reference
def test_the_reference_checkpoint_scores_as_published(tmp_path: Path) -> None:
    run, encoder = tmp_path / "run", tmp_path / "encoder"
    import_checkpoint(REFERENCE / "model.ckpt", run, encoder_out=encoder)
    expected = json.loads((REFERENCE / "expected.json").read_text())
    head = load_head(run / "head.safetensors")
    texts = expected["prompt_ids"], expected["response_ids"]
    own = score_token_ids(head, encoder, *texts, users=expected["user"])
    mixed = score_token_ids(head, encoder, *texts, mixtures=torch.tensor(expected["mix"]))
    torch.testing.assert_close(own, torch.tensor(expected["reward"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed, torch.tensor(expected["mix_reward"]), rtol=0, atol=1e-5)
    shape = head.shape
    assert isinstance(shape, PalB)
    assert (shape.k, shape.d, shape.p, len(head.users)) == (3, 16, 16, 3)


@needs_reference
def test_the_reference_checkpoint_goes_out_as_it_came_in(tmp_path: Path) -> None:
    run, encoder, out = tmp_path / "run", tmp_path / "encoder", tmp_path / "out.ckpt"
    import_checkpoint(REFERENCE / "model.ckpt", run, encoder_out=encoder, encoder_config=REFERENCE / "encoder")
    export_checkpoint(run, out, encoder=encoder)
    before, after = (torch.load(p, weights_only=True)["state_dict"] for p in (REFERENCE / "model.ckpt", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    again = read_published(out)
    assert (again.head.shape, again.head.users, again.assumed) == (*_of(run), None)


def _of(run: Path) -> tuple[Any, tuple[str, ...]]:
    head = load_head(run / "head.safetensors")
    return head.shape, head.users


@needs_reference
def test_the_commands(tmp_path: Path) -> None:
    palcache = Path(sys.executable).with_name("palcache")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [palcache, "checkpoint", *map(str, arguments)], capture_output=True, text=True, check=False
        )

    out_folder = "--encoder-out", tmp_path / "encoder"
    made = run("import", REFERENCE / "model.ckpt", "--run", tmp_path / "run", *out_folder, "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["users"] == ["alice7", "bob-2", "c9KZL1qe"]
    assert json.loads(made.stdout)["assumed_projector"] == "mlp2-gelu-dropout0"
    out = run("export", tmp_path / "run", tmp_path / "out.ckpt", "--encoder", tmp_path / "encoder")
    assert out.returncode == 0, out.stderr
    before, after = (
        torch.load(p, weights_only=True)["state_dict"] for p in (REFERENCE / "model.ckpt", tmp_path / "out.ckpt")
    )
    assert {name: value.tolist() for name, value in before.items()} == {n: v.tolist() for n, v in after.items()}
    refused = run("import", REFERENCE / "model.ckpt", "--run", tmp_path / "run")
    assert refused.returncode == 2
    assert "exists; name a new folder with --run" in refused.stderr


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 1},
        {"projector": "mlp0-linear-dropout0"},
        {"projector": "mlp1-gelu-dropout0-batchnorm-nobias", "temperature": 0.3},
        {"projector": "mlp3-relu-dropout05-residual-batchnorm", "p": 7, "score": "dist"},
        {"head": "pal-a"},
        {"projector": "identity", "p": 7},
        {"head": "pal-a", "user_form": "Pw", "score": "angle", "mixture": "partition"},
        {"head": "pal-a", "user_form": "|f(P)|w", "projector": "mlp1-gelu-dropout0-batchnorm"},
    ],
    ids=str,
)
def test_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    head = trained(**options)
    encoder = {"layers.0.weight": torch.randn(3, 4, generator=generator(1))}
    write_published(tmp_path / "x.ckpt", head, encoder)
    back = read_published(tmp_path / "x.ckpt")
    assert back.head.users == head.users
    assert back.head.shape == head.shape
    assert back.head.parameters.keys() == head.parameters.keys()
    for name, value in head.parameters.items():
        assert torch.equal(back.head.parameters[name], value), name
        assert back.head.parameters[name].dtype == value.dtype, name
    assert torch.equal(back.encoder["layers.0.weight"], encoder["layers.0.weight"])
    inferred = from_state(to_state(head), PublishedOptions(width=7, projector=without_layers(head))).head.shape
    assert isinstance(inferred, PalA | PalB)
    assert (inferred.k, inferred.d, inferred.p) == (head.shape.k, 7, getattr(head.shape, "p", None))
    assert inferred.items.hidden == (-1 if inferred.projector == "identity" else int(inferred.projector[3]))


def test_names_are_read_as_the_published_code_reads_them() -> None:
    """Residual and batchnorm stand in either order, and `-nobias` after them is overlooked: the file has biases."""
    head = trained(projector="mlp1-gelu-dropout0-residual-batchnorm", p=7)
    for name in ("mlp1-gelu-dropout0-batchnorm-residual", "mlp1-gelu-dropout0-residual-batchnorm-nobias"):
        read = from_state(to_state(head), PublishedOptions(projector=name)).head
        assert getattr(read.shape, "projector", None) == "mlp1-gelu-dropout0-residual-batchnorm"
    bare = trained(projector="mlp1-gelu-dropout0-nobias")
    read = from_state(to_state(bare), PublishedOptions(projector="mlp1-gelu-dropout0-nobias")).head
    assert read.parameters.keys() == bare.parameters.keys()


def test_dots_in_user_ids_are_escaped_for_the_published_code() -> None:
    names = [name for name in to_state(trained()) if ".W." in name]
    assert [name.split(".W.")[1] for name in names] == ["alice", "bob%2E2", "c%252E", "日本"]


def test_another_layout_names_its_keys(tmp_path: Path) -> None:
    state = to_state(trained())
    missing = {name: value for name, value in state.items() if "projectors.1" not in name}
    with pytest.raises(
        InputError, match=r"missing keys: user_learner\.projectors\.1\.mlp\.layers\.0\.bias,.* and 2 more"
    ):
        from_state(missing)
    with pytest.raises(InputError, match=r"missing keys: none; unexpected keys: extra\.bias"):
        from_state(state | {"prefLearner.extra.bias": torch.zeros(2)})
    torch.save({"state_dict": {"encoder.weight": torch.zeros(2, 2)}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"missing keys: projector_f.*unexpected keys: encoder\.weight"):
        read_published(tmp_path / "other.ckpt")
    changed = state | {"prefLearner.item_learner.projector.mlp.layers.0.bias": torch.full((5,), 9.0)}
    with pytest.raises(
        InputError, match=r"item_learner\.projector\.mlp\.layers\.0\.bias differs from the same layer elsewhere"
    ):
        from_state(changed)
    with pytest.raises(InputError, match="users or prototypes of different shapes"):
        from_state(
            state
            | {"prefLearner.user_learner.W.alice": torch.zeros(3), "prefLearner.user_learner.W.bob%2E2": torch.zeros(4)}
        )


class Unsafe:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Unsafe()}, tmp_path / "unsafe.ckpt")
    with pytest.raises(InputError, match="holds more than tensors and plain values, so reading it would run code"):
        read_published(tmp_path / "unsafe.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"state_dict": Unsafe()}))
    with pytest.raises(InputError, match=r"plain\.ckpt (holds more than tensors|cannot be read)"):
        read_published(tmp_path / "plain.ckpt")
    assert capsys.readouterr().out == ""


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no checkpoint .*nowhere\.ckpt"):
        read_published(tmp_path / "nowhere.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(InputError, match=r"text\.ckpt is no file that torch\.save wrote; name a \.ckpt file"):
        read_published(tmp_path / "text.ckpt")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "numbers.ckpt")
    with pytest.raises(InputError, match="holds no state dict of tensors"):
        read_published(tmp_path / "numbers.ckpt")


def test_what_cannot_go_out_or_come_in(tmp_path: Path) -> None:
    shape = build_head(HeadConfig(head="low-rank"), d=7, users=2)
    with pytest.raises(InputError, match="no place for low-rank"):
        to_state(TrainedHead(shape, shape.initial(generator(0)), ("a", "b"), {}))
    with pytest.raises(InputError, match="does not show the width of the vectors that it reads; give it with --width"):
        from_state(to_state(trained(projector="identity", p=7)), PublishedOptions(projector="identity"))
    write_published(tmp_path / "x.ckpt", trained())
    with pytest.raises(
        InputError, match=r"0 folders beside .*x\.ckpt have one; name the right one with --encoder-config"
    ):
        import_checkpoint(tmp_path / "x.ckpt", tmp_path / "run", encoder_out=tmp_path / "encoder")
    with pytest.raises(InputError, match="holds no foundation model; leave out --encoder-out"):
        import_checkpoint(
            tmp_path / "x.ckpt", tmp_path / "run", encoder_out=tmp_path / "encoder", encoder_config=tmp_path
        )
    assert not (tmp_path / "run").exists()
    import_checkpoint(tmp_path / "x.ckpt", tmp_path / "run", options=PublishedOptions(projector="mlp2-gelu-dropout0"))
    with pytest.raises(InputError, match=r"x\.ckpt exists; name a new file"):
        export_checkpoint(tmp_path / "run", tmp_path / "x.ckpt")
    with pytest.raises(Exception, match=r"has no model\.safetensors"):
        read_encoder(tmp_path)
