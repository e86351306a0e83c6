"""From a published checkpoint to a cache by the commands: import, embed with its own model, evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from palcache_cli.app import app
from typer.testing import CliRunner, Result

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead, load_head
from palcache.configs import HeadConfig
from palcache.encoders.hidden_states import load_hidden_states
from palcache.evaluation import predict_margins
from palcache.heads import build_head
from palcache.published.files import write_published
from palcache.published.scoring import score_token_ids
from palcache.tensors import load_preferences
from tests.building import generator
from tests.models import corpus, save_model

USERS = ("ann", "bo.b")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a foundation model, a checkpoint of another training of it, and comparisons."""
    folder = tmp_path_factory.mktemp("published")
    save_model("opt", folder / "base", seed=0)
    tuned = save_model("opt", folder / "tuned", seed=1)
    from safetensors.torch import load_file

    weights = load_file(tuned / "model.safetensors")
    shutil.rmtree(tuned)
    config = HeadConfig(k=3, p=5, projector="mlp2-gelu-dropout0", start="published")
    shape = build_head(config, d=20, users=2)
    write_published(folder / "model.ckpt", TrainedHead(shape, shape.initial(generator(0)), USERS, {}), weights)
    texts = corpus()
    rows = [
        {"user_id": USERS[at % 2], "prompt": texts[at % 3], "response_1": texts[at + 3], "response_2": texts[at + 5],
         "y": 1 - 2 * (at % 2)}
        for at in range(12)
    ]  # fmt: skip
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_checkpoint_evaluates_on_vectors_of_its_own_model(folder: Path, tmp_path: Path) -> None:
    run, encoder, cache = tmp_path / "run", tmp_path / "encoder", tmp_path / "cache"
    made = invoke("checkpoint", "import", folder / "model.ckpt", "--run", run, "--encoder-out", encoder)
    assert made.exit_code == 0, made.output
    assert (encoder / "tokenizer.json").is_file()
    split = ("--split-by", "row", "--val", 0, "--test", 0)
    embedded = invoke(
        "embed",
        folder / "t.jsonl",
        "--cache",
        cache,
        "--model",
        encoder,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *split,
    )
    assert embedded.exit_code == 0, embedded.output
    done = invoke("evaluate", run, "--cache", cache, "--split", "all", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    opened = Cache(cache)
    stored, head = opened.comparisons(), load_head(run / "head.safetensors")
    margins = predict_margins(head, load_preferences(opened, stored, device="cpu"))
    right = np.mean(np.sign(margins) == stored.comparisons.y)
    assert json.loads(done.stdout)["all"]["accuracy"]["micro"] == pytest.approx(right)
    np.testing.assert_allclose(margins, _rewards(head, encoder, folder / "t.jsonl"), atol=1e-5)


def _rewards(head: TrainedHead, encoder: Path, table: Path) -> np.ndarray:
    """Return margins scored end to end from token ids."""
    from palcache.configs import EmbedConfig

    rows = [json.loads(line) for line in table.read_text().splitlines()]
    loaded = load_hidden_states(EmbedConfig(model=str(encoder), device="cpu"))

    def ids(column: str) -> list[list[int]]:
        windows = [loaded.tokenize([row[column]], "response") for row in rows]
        return [window.features["input_ids"].tolist() for window in windows]

    users = [row["user_id"] for row in rows]
    sides = [
        score_token_ids(head, encoder, ids("prompt"), ids(side), users=users) for side in ("response_1", "response_2")
    ]
    out: np.ndarray = (sides[1] - sides[0]).numpy()
    return out


def test_another_config_is_named_where_there_are_two(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(folder / "base", tmp_path / name)
    shutil.copy(folder / "model.ckpt", tmp_path / "model.ckpt")
    options = ("--run", tmp_path / "run", "--encoder-out", tmp_path / "encoder")
    refused = invoke("checkpoint", "import", tmp_path / "model.ckpt", *options)
    assert refused.exit_code == 2
    assert "2 folders beside" in refused.stderr
    assert "name the right one with --encoder-config" in " ".join(refused.stderr.split())
    assert not (tmp_path / "run").exists()
    named = invoke("checkpoint", "import", tmp_path / "model.ckpt", *options, "--encoder-config", tmp_path / "a")
    assert named.exit_code == 0, named.output


def test_a_folder_without_a_tokenizer_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "base" / name, tmp_path / "bare" / name)
    refused = invoke("embed", folder / "t.jsonl", "--cache", tmp_path / "c", "--model", tmp_path / "bare")
    assert refused.exit_code == 2
    assert "has no tokenizer; copy the files of its tokenizer" in " ".join(refused.stderr.split())


class Unsafe:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"encoder.weight": torch.zeros(2, 2)}}, "unexpected keys: encoder.weight"),
        ({"state_dict": {}, "hyper_parameters": Unsafe()}, "holds more than tensors and plain values"),
        ({"state_dict": {"a": 3}}, "holds no state dict of tensors"),
    ],
)
def test_what_is_no_published_checkpoint_is_one_sentence(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    refused = invoke("checkpoint", "import", tmp_path / "x.ckpt", "--run", tmp_path / "run")
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    assert said.startswith("Error: ")
    assert message in said
    assert "unpickled" not in refused.output
    assert not (tmp_path / "run").exists()
