"""Token losses from a cache on: runs on token states, their evaluation, resumption, streaming, and what is refused."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from palcache_cli.app import app
from typer.testing import CliRunner, Result

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, FitConfig, HeadConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.encoders.hidden_states import HiddenStateEncoder, load_hidden_states
from palcache.errors import InputError
from palcache.evaluation import predict_margins
from palcache.published.scoring import score_token_ids
from palcache.runs.inputs import load_vectors, spaces_for
from palcache.runs.seen_users import suggest_run
from palcache.runs.trainings import evaluate_run, train_run
from palcache.token_batches import TokenData, load_tokens
from tests.models import corpus, save_model
from tests.worlds import Interrupter, Interruption, files_of

HEAD = HeadConfig(p=6, projector="mlp1-gelu-dropout1")
FIT = FitConfig(token_weighting="cumulative", epochs=3, batch_size=16, lr=1e-2)


@functools.cache
def model() -> Path:
    return save_model("opt", Path(tempfile.mkdtemp(prefix="palcache-test-")) / "opt")


@functools.cache
def encoder() -> HiddenStateEncoder:
    return load_hidden_states(EmbedConfig(model=str(model()), device="cpu", max_tokens=24))


def rows() -> list[dict[str, Any]]:
    """Return comparisons of three users; some responses begin alike, and one is the beginning of the other."""
    texts, random = corpus(), np.random.default_rng(0)
    out: list[dict[str, Any]] = []
    for at in range(90):
        left = texts[at % 13][: 40 + at % 9]
        right = left[:20] if at % 10 == 0 else left[:15] + texts[(at * 5 + 1) % 17][:30]
        split = "train" if at < 60 else "val" if at < 75 else "test"
        out.append({"user_id": f"u{at % 3}", "prompt": f"Which of {at % 4}?", "response_1": left,
                    "response_2": right, "y": int(random.choice([-1, 1])), "split": split})  # fmt: skip
    return out


def embed(folder: Path, **options: Any) -> Cache:
    config = EmbedConfig.from_mapping({"device": "cpu", "dtype": "float32", "shard_rows": 20, **options})
    table = Comparisons.from_rows(rows())
    embed_tables(table, folder, encoder=encoder(), config=config, split=SplitConfig(), name="t")
    return Cache(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("cache") / "c"
    embed(folder, tokens="all")
    return embed(folder, tokens="responses", items="joint")


def load(cache: Cache, *, joint: bool = False, **options: Any) -> TokenData:
    stored = cache.comparisons()
    head, config = HeadConfig(head="pal-a" if joint else "pal-b"), FitConfig(token_weighting="mean", **options)
    data = load_vectors(cache, stored, spaces_for(cache, stored, None, head, config), "cpu", config)
    assert isinstance(data, TokenData)
    return data


@pytest.mark.parametrize("joint", [False, True])
def test_batches_hold_the_encoders_states(cache: Cache, joint: bool) -> None:
    """Each position of each span has the states that the encoder gives each text alone."""
    data, table = load(cache, joint=joint), cache.comparisons().comparisons
    prompts, responses = table.prompts.to_list(), table.responses.to_pylist()
    batch = data.batch(torch.tensor([0, 10, 7]))
    for place, at in enumerate((0, 10, 7)):
        sides, ids = [], []
        for response in (responses[table.response_1[at]], responses[table.response_2[at]]):
            if joint:
                window, role = encoder().tokenize_pairs([prompts[at]], [response]), "joint"
            else:
                window, role = encoder().tokenize([response], "response"), "response"
            kept = "responses" if joint else "all"
            states = encoder().encode_states(window, np.array([0]), role, kept=kept).tokens  # type: ignore[arg-type]
            assert states is not None
            first = int(window.first_kept(kept)[0])  # type: ignore[arg-type]
            sides.append(states)
            ids.append(window.features["input_ids"][first : int(window.n_tokens[0])].tolist())
        short, end = sorted(map(len, ids))
        first = next((t for t in range(short) if ids[0][t] != ids[1][t]), short if short < end else end)
        mine, pairs = batch.comparison == place, batch.pairs
        assert int(mine.sum()) == max(1, end - first)
        for side, states in zip((pairs.response_1, pairs.response_2), sides, strict=True) if end > first else ():
            want = torch.stack([states[min(t, len(states) - 1)] for t in range(first, end)])
            torch.testing.assert_close(pairs.responses[side[mine]][: end - first], want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("alignment", ["pooled", "position"])
def test_prompts_are_vectors_or_states(cache: Cache, alignment: Any) -> None:
    data = load(cache, prompt_alignment=alignment)
    assert data.alignment == alignment
    batch, stored = data.batch(torch.arange(5)), cache.comparisons()
    assert len(batch.pairs.prompt) == (5 if alignment == "pooled" else len(batch.comparison))
    vectors = cache.space(stored.spaces[0][0])
    own = vectors.rows(vectors.find(stored.prompt_keys))[stored.comparisons.prompts.codes[:5]]
    served = data.served().batch(torch.arange(5))
    torch.testing.assert_close(served.prompts[served.prompt], own, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"prompt_alignment": "position"}, {"joint": True}], ids=str)
def test_streamed_states_are_the_resident_ones(cache: Cache, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = load(cache, **options)
    monkeypatch.setattr("palcache.token_batches.free_memory", lambda _device: 0)
    streamed = load(cache, **options)
    assert (resident.streamed, streamed.streamed) == (False, True)
    rows = torch.tensor([3, 50, 7, 3])
    for mine, other in ((resident.batch(rows).pairs, streamed.batch(rows).pairs),
                        (resident.served().batch(rows), streamed.served().batch(rows))):  # fmt: skip
        assert torch.equal(mine.responses[mine.response_1], other.responses[other.response_1])
        assert torch.equal(mine.prompts[mine.prompt], other.prompts[other.prompt])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_any_stored_type(dtype: Any, tmp_path: Path) -> None:
    data = load(embed(tmp_path / "c", tokens="all", dtype=dtype), prompt_alignment="position")
    pairs = data.batch(torch.arange(9)).pairs
    assert (pairs.responses.dtype, pairs.prompts.dtype) == (torch.float32, torch.float32)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pal-b pooled": ({}, {}),
    "pal-b position": ({}, {"prompt_alignment": "position", "token_weighting": "mean"}),
    "pal-b users": ({"score": "dist", "mixture": "gumbel"}, {"weighting": "users", "token_weighting": "only_last"}),
    "pal-b bound": ({"projector": "mlp1-relu-dropout0-batchnorm"}, {"bound_weight": 0.1, "precision": "bfloat16"}),
    "pal-a": ({"head": "pal-a"}, {"token_weighting": "mean"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_tokens(name: str, cache: Cache, tmp_path: Path) -> None:
    shape, steps = CASES[name]
    head, config = (HeadConfig.from_mapping(HEAD.to_dict() | shape), FitConfig.from_mapping(FIT.to_dict() | steps))
    run = train_run(cache, tmp_path / "run", head=head, config=config, device="cpu")
    losses = [row.train_loss for row in run.fitted.history] if run.fitted else []
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 <= metrics["test"]["token_accuracy"] <= 1
    assert "token_accuracy" in metrics["yardsticks"]["user_blind"]["val"]
    again = evaluate_run(tmp_path / "run", cache, device="cpu")
    assert again == run.evaluations["test"]
    assert train_run(cache, tmp_path / "run", head=head, config=config, resume=True).evaluations == run.evaluations


def test_rewards_of_a_run_are_those_of_token_ids(cache: Cache, tmp_path: Path) -> None:
    """What is evaluated is what would be served: foundation model, last position of both, head."""
    run = train_run(cache, tmp_path / "run", head=HEAD, config=FIT, device="cpu")
    data, table = load(cache), cache.comparisons().comparisons
    margins = predict_margins(run.head, data.served())
    prompts = table.prompts.to_list()
    responses = table.responses.to_pylist()

    def ids(texts: list[str], role: Any) -> list[list[int]]:
        window = encoder().tokenize(texts, role)
        ends = window.offsets + window.n_tokens if len(window.offsets) == len(texts) else window.offsets[1:]
        return [window.features["input_ids"][a:b].tolist() for a, b in zip(window.offsets, ends, strict=False)]

    users = [f"u{at % 3}" for at in range(6)]
    rewards = [
        score_token_ids(run.head, model(), ids([prompts[at] for at in range(6)], "prompt"),
                        ids([responses[side[at]] for at in range(6)], "response"), users=users)
        for side in (table.response_1, table.response_2)
    ]  # fmt: skip
    np.testing.assert_allclose((rewards[1] - rewards[0]).numpy(), margins[:6], atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palcache.runs.trainings.STATE_SECONDS", 0.0)
    train_run(cache, tmp_path / "whole", head=HEAD, config=FIT, device="cpu")
    with pytest.raises(Interruption):
        train_run(cache, tmp_path / "cut", head=HEAD, config=FIT, device="cpu", on_progress=Interrupter(4))
    train_run(cache, tmp_path / "cut", head=HEAD, config=FIT, device="cpu", resume=True)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_new_users_of_a_token_run_are_asked_on_last_states(cache: Cache, tmp_path: Path) -> None:
    run = train_run(cache, tmp_path / "run", head=HEAD, config=FIT, device="cpu")
    assert (tmp_path / "run" / "users.safetensors").exists()
    assert suggest_run(tmp_path / "run", cache, "t", user="u0", count=2, device="cpu")
    assert isinstance(run.head, TrainedHead)


def test_the_space_with_tokens_is_taken(tmp_path: Path) -> None:
    """A table that is embedded with and without tokens needs no --space for a token loss."""
    embed(tmp_path / "c")
    cache = embed(tmp_path / "c", tokens="responses")
    stored = cache.comparisons()
    assert len(stored.spaces) == 2
    spaces = spaces_for(cache, stored, None, HEAD, FIT)
    assert "tokens" in cache.spec(spaces["response"])
    with pytest.raises(InputError, match="choose one with --space"):
        spaces_for(cache, stored, None, HEAD, FitConfig())
    pooled = next(response for _, response in stored.spaces if "tokens" not in cache.spec(response))
    assert spaces_for(cache, stored, pooled[:8], HEAD, FitConfig())["response"] == pooled
    with pytest.raises(InputError, match=r"the cache has those of responses alone; make them with .* --tokens all"):
        train_run(
            cache, tmp_path / "run", head=HEAD, config=FitConfig(token_weighting="mean", prompt_alignment="position")
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_on_a_gpu_train_alike(cache: Cache, tmp_path: Path) -> None:
    """The same batches, the same bytes twice, and losses near those of the CPU."""
    runs = [
        train_run(cache, tmp_path / f"{at}{device}", head=HEAD, config=FIT, device=device)
        for at, device in enumerate(("cuda", "cuda", "cpu"))
    ]
    losses = [[row.train_loss for row in run.fitted.history] for run in runs if run.fitted]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


def train(cache: Path, run: Path, *options: object) -> Result:
    command = ["train-head", str(cache), "--run", str(run), "--epochs", "1", "--device", "cpu", *map(str, options)]
    return CliRunner().invoke(app, command)


def test_the_commands(cache: Cache, tmp_path: Path) -> None:
    made = train(
        cache.path, tmp_path / "run", "--token-weighting", "mean", "--prompt-alignment", "position", "--p", "6"
    )
    assert made.exit_code == 0, made.output
    assert "right tokens" in made.stdout
    evaluated = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--cache", str(cache.path), "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    assert "token_accuracy" in json.loads(evaluated.stdout)["test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--token-weighting", "mean"), "the cache is pooled; make them with palcache embed ... --encoder hidden --tokens"),
        (("--head", "pal-a"), "the table t has none in"),
        (("--head", "pal-a", "--token-weighting", "mean"), "--items joint --tokens responses"),
        (("--prompt-alignment", "position"), "it belongs to token losses: add --token-weighting"),
        (("--head", "low-rank", "--token-weighting", "mean"), "the cache is pooled"),
        (("--projector", "mlp2-relu-dropout0-residual"), "a residual projector needs d = p: choose --p 20"),
        (("--projector", "mlp2-tanh-dropout0"), "expected identity or mlp{L}-{relu|gelu|linear}-dropout{D}[-residual]"),
        (("--lr", "1e30"), "with learning rate 1.00e+30; lower --lr"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_sentence(pooled: Path, options: Any, message: str, tmp_path: Path) -> None:
    refused = train(pooled, tmp_path / "run", *options)
    assert refused.exit_code == (1 if "--lr" in options else 2)
    said = " ".join(refused.stderr.split())
    assert said.startswith("Error: ")
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embed(tmp_path_factory.mktemp("pooled") / "c").path


def test_an_item_without_kept_tokens_has_a_defined_reward(tmp_path: Path) -> None:
    """Prompts that fill the limit leave their responses no token: spans are empty, rewards of zeros, nothing breaks."""
    narrow = load_hidden_states(EmbedConfig(model=str(model()), device="cpu", max_tokens=8))
    config = EmbedConfig(device="cpu", dtype="float32", tokens="responses", items="joint")
    table = [{**row, "prompt": row["prompt"] * (4 if at % 2 else 1)} for at, row in enumerate(rows())]
    embed_tables(
        Comparisons.from_rows(table), tmp_path / "c", encoder=narrow, config=config, split=SplitConfig(), name="t"
    )
    cache = Cache(tmp_path / "c")
    data = load(cache, joint=True)
    assert int((data.responses.lengths == 0).sum())
    run = train_run(cache, tmp_path / "run", head=HeadConfig(head="pal-a", p=6), config=FIT, device="cpu")
    assert all(torch.isfinite(value).all() for value in run.head.parameters.values())
    assert load_tokens(cache, cache.comparisons(), run.head.about["spaces"], device="cpu").joint
