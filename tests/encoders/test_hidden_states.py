"""Hidden-state encoders: a vector is that of its text alone, whatever the batch, the padding and the cache."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from palcache.cache import Cache
from palcache.care.verification import reencode_sample, verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, SplitConfig, StoredDtype
from palcache.embedding.stages import embed_tables
from palcache.encoders import TokenizedTexts
from palcache.encoders.choices import choose_kind, load_encoder
from palcache.encoders.hidden_states import HiddenStateEncoder, load_hidden_states
from palcache.encoders.loading import resolve_compute_dtype
from palcache.errors import InputError, ModelError
from tests.models import CHAT_TEMPLATE, FAMILIES, corpus, save_model

TEXTS = ["a", *(text[: 9 * at] for at, text in enumerate(corpus()[:14], 1))]
CAUSAL = ("opt", "qwen2", "gpt2")


@functools.cache
def model_folder(family: str) -> Path:
    """Return a tiny model, made once per process."""
    return save_model(family, Path(tempfile.mkdtemp(prefix="palcache-test-")) / family)


@functools.cache
def left_padding(family: str) -> Path:
    """Return the same model with a tokenizer that pads on the left."""
    folder = model_folder(family).with_name(f"{family}-left")
    shutil.copytree(model_folder(family), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


def load(family: str, *, padding_side: str = "right", **options: Any) -> HiddenStateEncoder:
    folder = model_folder(family) if padding_side == "right" else left_padding(family)
    return load_hidden_states(EmbedConfig(model=str(folder), device="cpu", encoder="hidden", **options))


@functools.cache
def reference(family: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer as transformers loads them, untouched by palcache."""
    folder = model_folder(family)
    network = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return network, transformers.AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def states_alone(family: str, text: str, *, layer: int = -1, special: bool = True) -> torch.Tensor:
    """Return the states of one text by a plain forward pass, (t, d)."""
    network, tokenizer = reference(family)
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=64, add_special_tokens=special)
    out = network(input_ids=tokens["input_ids"], output_hidden_states=True)
    states: torch.Tensor = out.last_hidden_state[0] if layer == -1 else out.hidden_states[layer][0]
    return states


def pooled_alone(states: torch.Tensor, pooling: str) -> torch.Tensor:
    return {"last": states[-1], "mean": states.mean(dim=0), "cls": states[0]}[pooling]


def table() -> Comparisons:
    return Comparisons.from_rows(
        [
            {"user_id": f"u{at % 2}", "prompt": f"which {at % 3}?", "response_1": a, "response_2": b, "y": 1}
            for at, (a, b) in enumerate(zip(TEXTS[:-1], TEXTS[1:], strict=True))
        ]
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_each_text_alone(family: str, side: str) -> None:
    encoder = load(family, padding_side=side)
    window = encoder.tokenize(TEXTS, "response")
    order = np.random.default_rng(3).permutation(len(TEXTS))
    assert not encoder.equal_lengths
    for rows in np.array_split(order, 3):
        got = encoder.encode_states(window, rows, "response", kept="all")
        alone = [states_alone(family, TEXTS[row]) for row in rows]
        assert got.tokens is not None
        torch.testing.assert_close(got.tokens, torch.cat(alone), atol=1e-5, rtol=0)
        pooled = torch.stack([pooled_alone(states, encoder.pooling) for states in alone])
        torch.testing.assert_close(got.pooled, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_and_layer_are_those_of_the_model(family: str, pooling: str) -> None:
    if pooling == "cls" and family in CAUSAL:
        with pytest.raises(InputError, match="is causal, so the state of its first token"):
            load(family, pooling="cls")
        return
    for layer in (0, 2, -2, -1):
        encoder = load(family, pooling=pooling, layer=layer)
        got = encoder.encode(encoder.tokenize(TEXTS, "prompt"), np.arange(len(TEXTS)), "prompt")
        expected = torch.stack([pooled_alone(states_alone(family, text, layer=layer), pooling) for text in TEXTS])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert encoder.width == expected.shape[1]


def test_the_probe_tells_causal_models_and_widths() -> None:
    assert [family for family in FAMILIES if load(family).causal] == ["opt", "qwen2", "gpt2"]
    assert load("opt").width == 20, "OPT projects its last layer to the width of the embeddings"
    assert load("opt", layer=1).width == 48
    assert load("xlm-roberta").limit == 64, "two positions lie behind the padding"


def test_the_last_layer_has_one_name() -> None:
    last, numbered, inner = (load("qwen2", layer=layer) for layer in (-1, 3, 2))
    assert last.spec("prompt") == numbered.spec("prompt")
    assert last.spec("prompt") != inner.spec("prompt")


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(InputError, match=rf"Got --layer {layer}; .* has the layers 0 \(embeddings\) to 3"):
        load("gpt2", layer=layer)


def test_the_prompt_state_of_a_joint_item_comes_from_the_same_pass() -> None:
    encoder = load("qwen2")
    prompts, responses = ["What is fair? ", "And now, "], ["A long answer to it.", "no"]
    window = encoder.tokenize_pairs(prompts, responses)
    assert window.prompt_tokens is not None
    got = encoder.encode_states(window, np.arange(2), "joint", kept="responses")
    at = 0
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        states = states_alone("qwen2", prompt + response)
        count = int(window.prompt_tokens[row])
        _, tokenizer = reference("qwen2")
        ids = tokenizer(prompt + response)["input_ids"]
        assert prompt.startswith(tokenizer.decode(ids[:count]))
        assert len(tokenizer.decode(ids[: count + 1])) > len(prompt), "the next token is the first of the response"
        assert got.prompt is not None
        assert got.tokens is not None
        torch.testing.assert_close(got.prompt[row], states[count - 1], atol=1e-5, rtol=0)
        kept = got.tokens[at : at + len(states) - count]
        torch.testing.assert_close(kept, states[count:], atol=1e-5, rtol=0)
        at += len(kept)


def test_bidirectional_models_have_no_prompt_state() -> None:
    encoder = load("distilbert")
    window = encoder.tokenize_pairs(["Is it?"], [" It is."])
    assert encoder.spec("joint")["prompt_state"] is False
    assert encoder.encode_states(window, np.arange(1), "joint").prompt is None


def test_templates_stand_around_the_texts() -> None:
    encoder = load("opt", prompt_template="Human: {text} Assistant:", response_template=" {text}")
    got = encoder.encode(encoder.tokenize(["why?"], "prompt"), np.arange(1), "prompt")
    torch.testing.assert_close(got[0], states_alone("opt", "Human: why? Assistant:")[-1], atol=1e-5, rtol=0)
    joint = encoder.tokenize_pairs(["why?"], ["so"])
    assert joint.texts == ["Human: why? Assistant: so"]
    assert encoder.spec("prompt") != load("opt").spec("prompt")


def test_chat_templates_write_prompts_and_joint_items() -> None:
    encoder = load("qwen2", chat_template=True)
    got = encoder.encode(encoder.tokenize(["why?"], "prompt"), np.arange(1), "prompt")
    alone = states_alone("qwen2", "<user>why?<assistant>", special=False)
    torch.testing.assert_close(got[0], alone[-1], atol=1e-5, rtol=0)
    joint = encoder.tokenize_pairs(["why?"], ["so"])
    assert joint.texts == ["<user>why?<assistant>so"]
    assert encoder.spec("prompt")["template"] == ["chat", CHAT_TEMPLATE]
    assert encoder.spec("response") == load("qwen2").spec("response")


def test_a_chat_template_must_be_there() -> None:
    with pytest.raises(InputError, match="has no chat template; write one with --prompt-template"):
        load("opt", chat_template=True)


@pytest.mark.parametrize("template", ["Human:", "{text} {text}"])
def test_a_template_names_the_text_once(template: str) -> None:
    with pytest.raises(InputError, match=r"expected a text with \{text\} once"):
        EmbedConfig(prompt_template=template)


def test_a_text_longer_than_the_model_is_truncated_and_flagged() -> None:
    encoder = load("gpt2")
    long = "word " * 300
    window = encoder.tokenize([long, "short"], "response")
    assert window.truncated.tolist() == [True, False]
    assert int(window.n_tokens[0]) == encoder.limit == 64
    got = encoder.encode(window, np.arange(2), "response")
    torch.testing.assert_close(got[0], states_alone("gpt2", long)[-1], atol=1e-5, rtol=0)


def test_more_tokens_than_the_model_reads_are_refused() -> None:
    with pytest.raises(InputError, match=r"Got max_tokens = 65; the model xlm-roberta reads at most 64"):
        load("xlm-roberta", max_tokens=65)


class _Breaking:
    """A tokenizer that breaks on some texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str], **options: Any) -> Any:
        if any("BREAK" in text for text in texts):
            raise RuntimeError("tokenizer broke")
        return self._tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_text_that_breaks_the_tokenizer_fails_alone(tmp_path: Path) -> None:
    encoder = load("qwen2")
    encoder._tokenizer = _Breaking(encoder._tokenizer)
    rows = [
        {"user_id": "u", "prompt": "p", "response_1": a, "response_2": b, "y": 1}
        for a, b in (("good", "BREAK it"), ("fine", "also fine"))
    ]
    whole = SplitConfig(by="row", val=0.0, test=0.0)
    summary = embed_tables(Comparisons.from_rows(rows), tmp_path / "cache", encoder=encoder, split=whole)
    assert (summary.failed, summary.encoded) == (1, 4)
    line = next((tmp_path / "cache").glob("spaces/*/failed.jsonl")).read_text()
    assert json.loads(line)["text"] == "BREAK it"
    assert "the tokenizer failed on the text (RuntimeError: tokenizer broke)" in line


def test_a_text_without_tokens_fails_alone() -> None:
    encoder = load("qwen2")
    window = TokenizedTexts(
        ["", "x"], np.array([0, 1], np.uint32), np.zeros(2, bool), np.array([0, 0, 1]), {"input_ids": np.array([7])}
    )
    with pytest.raises(ValueError, match="the text has no tokens"):
        encoder.encode(window, np.arange(2), "response")


def test_a_tokenizer_that_changed_is_another_space(tmp_path: Path) -> None:
    folder = save_model("qwen2", tmp_path / "model")
    config = EmbedConfig(model=str(folder), device="cpu")
    embed_tables(table(), tmp_path / "cache", config=config, name="t")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    with pytest.warns(
        UserWarning, match=r"its tokenizer changed since, so its (prompt|response) vectors go into a space"
    ):
        embed_tables(table(), tmp_path / "cache", config=config, name="t")
    assert len(Cache(tmp_path / "cache").space_ids) == 4


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model("qwen2", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(layers.1.mlp.up_proj.weight"):
        load_hidden_states(EmbedConfig(model=str(folder), device="cpu"))


def test_missing_poolers_do_not_change_the_identity(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model("xlm-roberta", tmp_path / "model")
    weights = {
        name: value for name, value in load_file(folder / "model.safetensors").items() if not name.startswith("pooler.")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = EmbedConfig(model=str(folder), device="cpu")
    assert load_hidden_states(config).spec("prompt") == load_hidden_states(config).spec("prompt")


def test_an_attention_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="cannot use --attn nonsense"):
        load("qwen2", attn="nonsense")


def test_the_attention_is_recorded_and_changes_no_identity() -> None:
    eager, sdpa = load("qwen2", attn="eager"), load("qwen2", attn="sdpa")
    assert (eager.versions["attention"], sdpa.versions["attention"]) == ("eager", "sdpa")
    assert eager.spec("prompt") == sdpa.spec("prompt")


def test_bfloat16_asked_of_a_device_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _emulated=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "Old GPU")
    with pytest.raises(InputError, match="Old GPU does not compute in bfloat16; use float16 or float32"):
        resolve_compute_dtype("bfloat16", torch.device("cuda"))


def test_bfloat16_decoders_are_near_float32() -> None:
    half, full = load("opt", compute_dtype="bfloat16"), load("opt")
    rows = np.arange(len(TEXTS))
    ours = half.encode(half.tokenize(TEXTS, "prompt"), rows, "prompt")
    exact = full.encode(full.tokenize(TEXTS, "prompt"), rows, "prompt")
    assert ours.dtype == torch.float32
    assert half.causal
    assert float(torch.nn.functional.cosine_similarity(ours, exact).min()) > 0.99
    assert half.spec("prompt")["weights"] == full.spec("prompt")["weights"]


def test_slow_tokenizers_are_refused() -> None:
    network, tokenizer = reference("gpt2")

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"is a slow one \(Slow\)"):
        HiddenStateEncoder(network, Slow(), label="m", device=torch.device("cpu"), dtype=torch.float32)
    assert tokenizer.is_fast


def test_joint_items_of_a_tokenizer_that_cuts_on_the_left_are_refused() -> None:
    encoder = load("opt")
    encoder._tokenizer.truncation_side = "left"
    with pytest.raises(InputError, match="truncates on the left and would cut prompts off"):
        encoder.tokenize_pairs(["p"], ["r"])


def test_the_kind_follows_the_folder(tmp_path: Path) -> None:
    folder = save_model("distilbert", tmp_path / "model")
    assert choose_kind(EmbedConfig(model=str(folder))) == "hidden"
    (folder / "modules.json").write_text("[]")
    assert choose_kind(EmbedConfig(model=str(folder))) == "sentence"
    assert choose_kind(EmbedConfig(model=str(folder), encoder="hidden")) == "hidden"


@pytest.mark.parametrize(
    ("option", "value", "name"), [("tokens", "all", "--tokens"), ("items", "joint", "--items joint")]
)
def test_options_for_hidden_states_are_refused_elsewhere(option: str, value: str, name: str) -> None:
    with pytest.raises(InputError, match=f"which has no {name}; add --encoder hidden"):
        load_encoder(EmbedConfig.from_mapping({"encoder": "sentence", option: value}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("family", ["opt", "xlm-roberta"])
def test_a_cached_vector_equals_a_fresh_one(family: str, dtype: StoredDtype, tmp_path: Path) -> None:
    config = EmbedConfig(model=str(model_folder(family)), device="cpu", dtype=dtype, token_budget=70)
    summary = embed_tables(table(), tmp_path / "cache", config=config)
    cache = Cache(tmp_path / "cache")
    assert verify_cache(cache).problems == ()
    compared, lowest, problems = reencode_sample(cache, load(family), 99)
    assert problems == ()
    assert compared == summary.encoded
    floor = {"float32": 0.9999999, "float16": 0.999999, "bfloat16": 0.9999, "int8": 0.999}[dtype]
    assert lowest >= floor - 1e-6
    assert bool(summary.cosines) == (dtype != "float32")
    assert all(cosine >= floor - 1e-6 for cosine in summary.cosines.values())


def test_minilm_cached_equals_fresh_in_every_type(tmp_path: Path) -> None:
    for dtype, floor in (("float32", 0.999999), ("int8", 0.9995)):
        config = EmbedConfig.from_mapping({"device": "cpu", "dtype": dtype})
        embed_tables(table(), tmp_path / dtype, config=config)
        _, lowest, problems = reencode_sample(Cache(tmp_path / dtype), load_encoder(config), 99)
        assert problems == ()
        assert lowest >= floor
