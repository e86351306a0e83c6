"""Token states in shards: what is stored, where responses part, and that a kill loses nothing."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from palcache_cli.app import app
from typer.testing import CliRunner

from palcache.cache import Cache
from palcache.care.verification import reencode_sample, verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, SplitConfig, StoredDtype
from palcache.embedding.encoding import embed_comparisons, plan_embedding
from palcache.embedding.stages import embed_tables
from palcache.encoders.hidden_states import HiddenStateEncoder, load_hidden_states
from palcache.errors import CacheError, InputError, NumericsError
from palcache.joints import load_joint
from palcache.spans import comparison_spans, divergence_spans
from palcache.storage.datasets import sampled_rows
from palcache.tensors import load_preferences
from tests.models import corpus, save_model
from tests.stubs import StubEncoder, contents, differing, flip_bit, small_table

WHOLE = SplitConfig(by="row", val=0.0, test=0.0)


@functools.cache
def model_folder(family: str) -> Path:
    """Return a tiny model, made once per process."""
    return save_model(family, Path(tempfile.mkdtemp(prefix="palcache-test-")) / family)


@functools.cache
def encoder_of(family: str) -> HiddenStateEncoder:
    return load_hidden_states(EmbedConfig(model=str(model_folder(family)), device="cpu"))


@functools.cache
def table() -> Comparisons:
    texts = [text[: 11 * at] for at, text in enumerate(corpus()[:13], 1)]
    return Comparisons.from_rows(
        [
            {"user_id": f"u{at % 3}", "prompt": f"Which of {at % 4}? ", "response_1": a, "response_2": b, "y": -1}
            for at, (a, b) in enumerate(zip(texts, [*texts[1:], texts[-1][:50]], strict=True))
        ]
    )


def embed(folder: Path, family: str = "qwen2", **options: Any) -> Cache:
    config = EmbedConfig.from_mapping({"device": "cpu", "token_budget": 90, "shard_rows": 5, **options})
    embed_tables(table(), folder, encoder=encoder_of(family), config=config, split=WHOLE, name="t")
    return Cache(folder)


def only_space(cache: Cache, role: str) -> Any:
    return next(space for space in map(cache.space, cache.space_ids) if space.role == role)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_stored_states_are_those_of_each_text_alone(dtype: StoredDtype, tmp_path: Path) -> None:
    cache, encoder = embed(tmp_path / "c", tokens="all", dtype=dtype), encoder_of("qwen2")
    assert verify_cache(cache).problems == ()
    for role, texts in (("prompt", table().prompts.values), ("response", table().responses)):
        space = only_space(cache, role)
        assert len(space.shards) == -(-len(texts) // 5)
        window = encoder.tokenize(texts.to_pylist(), role)  # type: ignore[arg-type]
        order = np.random.default_rng(1).permutation(len(texts))
        values, offsets = space.tokens(order)
        ids, same_offsets = space.token_ids(order)
        assert values.dtype == {"int8": torch.float32}.get(dtype, getattr(torch, dtype))
        assert torch.equal(offsets, same_offsets)
        for row, text in enumerate(order.tolist()):
            alone = encoder.encode_states(window, np.array([text]), role, kept="all").tokens  # type: ignore[arg-type]
            assert alone is not None
            got = values[offsets[row] : offsets[row + 1]].float()
            within = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2, "int8": 4e-2}[dtype]
            torch.testing.assert_close(got, alone, atol=within, rtol=0)
            at = int(window.offsets[text])
            expected = window.features["input_ids"][at : at + int(window.n_tokens[text])]
            assert ids[offsets[row] : offsets[row + 1]].tolist() == expected.tolist()


def test_neighbours_in_a_shard_are_not_copied(tmp_path: Path) -> None:
    space = only_space(embed(tmp_path / "c", tokens="responses", dtype="float32"), "response")
    values, offsets = space.tokens(np.arange(1, 4))
    whole = space._parts("tok/values")[0]
    assert values.data_ptr() == whole[int(space.token_lengths([0])[0]) :].data_ptr()
    copied, _ = space.tokens(np.array([3, 1, 2]))
    assert copied.shape == values.shape
    across, _ = space.tokens(np.arange(2, 9))
    assert len(across) == int(space.token_lengths(np.arange(2, 9)).sum())
    empty, none = space.tokens(np.empty(0, np.int64))
    assert (tuple(empty.shape), none.tolist()) == ((0, space.width), [0])
    assert len(offsets) == 4


def test_responses_alone_keep_no_prompt_states(tmp_path: Path) -> None:
    cache = embed(tmp_path / "c", tokens="responses")
    assert only_space(cache, "response").token_count > 0
    with pytest.raises(CacheError, match="keeps no token states; embed with --tokens"):
        only_space(cache, "prompt").tokens([0])
    with pytest.raises(IndexError, match="Got the row 99; the space"):
        only_space(cache, "response").tokens([99])
    values, offsets = cache.tokens(only_space(cache, "response").space_id, np.array([1]))
    assert len(values) == int(offsets[-1])


def test_spans_begin_where_ids_differ_and_end_with_the_longer(tmp_path: Path) -> None:
    cache = embed(tmp_path / "c", tokens="responses")
    spans, rows = comparison_spans(cache, cache.comparisons()), table()
    tokenizer = encoder_of("qwen2")._tokenizer
    ids = [tokenizer(text)["input_ids"] for text in rows.responses.to_pylist()]
    for at in range(len(rows)):
        left, right = ids[rows.response_1[at]], ids[rows.response_2[at]]
        shared = min(len(left), len(right))
        expected = next((place for place in range(shared) if left[place] != right[place]), shared)
        assert (int(spans.first[at]), int(spans.end[at])) == (expected, max(len(left), len(right)))
    assert int(spans.first[-1]) > 0, "the last pair begins alike"
    space = only_space(cache, "response")
    same = divergence_spans(space, np.array([2]), np.array([2]))
    assert same.first.tolist() == same.end.tolist() == space.token_lengths([2]).tolist()


def test_spans_do_not_depend_on_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = embed(tmp_path / "c", tokens="responses")
    whole = comparison_spans(cache, cache.comparisons())
    monkeypatch.setattr("palcache.spans.CHUNK_TOKENS", 7)
    parts = comparison_spans(cache, cache.comparisons())
    assert np.array_equal(whole.first, parts.first)
    assert np.array_equal(whole.end, parts.end)


@pytest.mark.parametrize("family", ["opt", "distilbert"])
def test_joint_tables_give_items_and_prompt_states(family: str, tmp_path: Path) -> None:
    cache, encoder = embed(tmp_path / "c", family, items="joint", tokens="all", dtype="float32"), encoder_of(family)
    assert verify_cache(cache).problems == ()
    assert reencode_sample(cache, encoder, 50)[2] == ()
    data = load_joint(cache, cache.comparisons(), device="cpu")
    batch = data.batch(torch.arange(len(data)))
    rows = table()
    for side, item in ((rows.response_1, batch.item_1), (rows.response_2, batch.item_2)):
        prompts = rows.prompts.to_list()
        responses = rows.responses.take(side.tolist()).to_pylist()
        window = encoder.tokenize_pairs(prompts, responses)
        for at in range(len(rows)):
            alone = encoder.encode_states(window, np.array([at]), "joint")
            torch.testing.assert_close(batch.items[item[at]], alone.pooled[0], atol=1e-5, rtol=0)
            assert (batch.prompts is None) == (alone.prompt is None)
            if batch.prompts is not None and alone.prompt is not None:
                torch.testing.assert_close(batch.prompts[item[at]], alone.prompt[0], atol=1e-5, rtol=0)
    space = only_space(cache, "joint")
    spans = comparison_spans(cache, cache.comparisons(), joint=True)
    assert (spans.end > spans.first).all()
    shared = space.prompt_lengths(space.find(cache.comparisons().joint_keys)[cache.comparisons().joint_items[1][:, 0]])
    assert (spans.first >= shared - 1).all(), "the prompt is the same on both sides"


def test_joint_items_are_distinct_pairs() -> None:
    pairs, items = table().joint_items()
    rows = table()
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    assert np.array_equal(pairs[items[:, 0], 0], rows.prompts.codes)
    assert np.array_equal(pairs[items[:, 0], 1], rows.response_1)
    assert np.array_equal(pairs[items[:, 1], 1], rows.response_2)
    assert pairs[:2].tolist() == [[0, 0], [0, 1]], "in order of first appearance"


def test_joint_states_of_responses_begin_behind_the_prompt(tmp_path: Path) -> None:
    whole = only_space(embed(tmp_path / "a", items="joint", tokens="all", dtype="float32"), "joint")
    part = only_space(embed(tmp_path / "b", items="joint", tokens="responses", dtype="float32"), "joint")
    rows = np.arange(len(whole))
    assert np.array_equal(whole.token_lengths(rows) - whole.prompt_lengths(rows), part.token_lengths(rows))
    for row in rows:
        expected = whole.tokens([row])[0][int(whole.prompt_lengths([row])[0]) :]
        torch.testing.assert_close(part.tokens([row])[0], expected, atol=1e-5, rtol=0)


def test_a_table_that_is_not_joint_says_so(tmp_path: Path) -> None:
    cache = embed(tmp_path / "c")
    with pytest.raises(InputError, match=r"is embedded by 0 encoders jointly .* embed with --items joint"):
        load_joint(cache, cache.comparisons())


def test_a_joint_table_has_no_separate_vectors(tmp_path: Path) -> None:
    cache = embed(tmp_path / "c", items="joint")
    with pytest.raises(InputError, match=r"holds joint items only.*with --items separate too"):
        load_preferences(cache, cache.comparisons())
    both = embed(tmp_path / "c", items="separate")
    assert len(load_preferences(both, both.comparisons())) == len(load_joint(both, both.comparisons())) == len(table())


def test_encoders_of_one_vector_refuse_tokens_and_joint_items(tmp_path: Path) -> None:
    for options in ({"tokens": "all"}, {"items": "joint"}):
        config = EmbedConfig.from_mapping(options)
        with pytest.raises(InputError, match="need hidden states; add --encoder hidden"):
            plan_embedding(small_table(), StubEncoder(), None, config=config)
        with pytest.raises(InputError, match="need hidden states; add --encoder hidden"):
            embed_comparisons(small_table(), StubEncoder(), Cache.create(tmp_path / "c"), name="t", config=config)


@pytest.mark.parametrize("items", ["separate", "joint"])
def test_the_plan_says_how_large_the_states_will_be(items: str, tmp_path: Path) -> None:
    config = EmbedConfig.from_mapping({"tokens": "all", "items": items, "dtype": "int8"})
    planned = plan_embedding(table(), encoder_of("qwen2"), None, config=config)
    done = embed_comparisons(table(), encoder_of("qwen2"), Cache.create(tmp_path / "c"), name="t", config=config)
    spaces = [Cache(tmp_path / "c").space(space_id) for space_id in done.spaces.values()]
    count = sum(space.token_count for space in spaces)
    assert planned.token_bytes == pytest.approx(count * (40 + 4 + 4) + 8 * planned.encoded, abs=4)
    assert planned.tokens == done.tokens
    assert not list(tmp_path.glob("c/nothing"))


def test_damage_in_token_states_is_found(tmp_path: Path) -> None:
    cache = embed(tmp_path / "c", tokens="responses", shard_rows=99)
    shard = only_space(cache, "response").shards[0]
    values = shard.dataset("tok/values").tobytes()
    flip_bit(shard.path, shard.path.read_bytes().index(values[:64]) + 17)
    problems = verify_cache(Cache(cache.path)).problems
    assert len(problems) == 1
    assert "the bytes of tok/values, rows 0 to" in problems[0]


def test_many_states_make_smaller_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palcache.embedding.works.TOKEN_SHARD_BYTES", 20_000)
    cache = embed(tmp_path / "c", tokens="responses", shard_rows=99, dtype="float32")
    space = only_space(cache, "response")
    assert len(space.shards) > 1
    assert all(shard.dataset("tok/values").nbytes < 60_000 for shard in space.shards)


def test_overflow_in_a_token_state_names_the_text(tmp_path: Path) -> None:
    encoder = load_hidden_states(EmbedConfig(model=str(model_folder("opt")), device="cpu", layer=2))
    with torch.inference_mode():
        encoder._network.decoder.layers[1].final_layer_norm.weight.mul_(1e6)
    config = EmbedConfig(tokens="responses")
    with pytest.raises(NumericsError, match=r"beyond the range of float16.*store with --dtype bfloat16"):
        embed_tables(table(), tmp_path / "c", encoder=encoder, config=config, split=WHOLE)


def test_the_sample_is_spread_over_a_shard() -> None:
    assert sampled_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert len(sampled_rows(10_000)) == 256
    assert np.all(np.diff(sampled_rows(10_000)) > 0)
    assert len(sampled_rows(0)) == 0


def test_the_cosines_of_the_sample_are_those_of_the_rows(tmp_path: Path) -> None:
    exact = only_space(embed(tmp_path / "a", dtype="float32", shard_rows=99), "response")
    rough = only_space(embed(tmp_path / "b", dtype="int8", shard_rows=99), "response")
    cosine = torch.nn.functional.cosine_similarity(exact.tensor().double(), rough.tensor().double())
    assert rough.shards[0].cosines == pytest.approx(cosine.numpy(), abs=1e-6)
    assert len(exact.shards[0].cosines) == 0
    assert torch.equal(rough.rows([3, 1]), rough.tensor()[[3, 1]])


_CHILD = """
import sys
from pathlib import Path
from palcache.encoders.hidden_states import HiddenStateEncoder
from tests import test_token_states as here
folder, model, items, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
import time
plain = HiddenStateEncoder.encode_states
def slow(self, *arguments, **options):
    time.sleep(seconds)
    return plain(self, *arguments, **options)
HiddenStateEncoder.encode_states = slow
here.model_folder = lambda family: Path(model)
import torch
from palcache_cli.app import app
from typer.testing import CliRunner
torch.set_num_threads(1)
here.embed(folder, items=items, tokens="all", dtype="int8", token_budget=30)
"""


def _child(folder: Path, items: str, seconds: float) -> subprocess.Popen[bytes]:
    arguments = [str(folder), str(model_folder("qwen2")), items, str(seconds)]
    return subprocess.Popen([sys.executable, "-c", _CHILD, *arguments], cwd=Path(__file__).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("items", ["separate", "joint"])
def test_a_killed_run_resumes_byte_for_byte(items: str, tmp_path: Path) -> None:
    assert _child(tmp_path / "whole", items, 0.0).wait() == 0
    for _ in range(3):
        child = _child(tmp_path / "cut", items, 0.05)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cut").glob("spaces/*/shards/*.partial")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert _child(tmp_path / "cut", items, 0.0).wait() == 0
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert any(name.endswith(".h5") for name in whole)
    assert differing(whole, cut) == []


def test_the_commands_plan_embed_and_verify_token_states(tmp_path: Path) -> None:
    path, cache = tmp_path / "t.jsonl", tmp_path / "c"
    sides = zip(table().response_1, table().response_2, strict=True)
    prompts, responses = table().prompts.to_list(), table().responses.to_pylist()
    lines = [
        {"user_id": "u", "prompt": prompts[at], "response_1": responses[a], "response_2": responses[b], "y": 1}
        for at, (a, b) in enumerate(sides)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = ["--model", str(model_folder("opt")), "--pooling", "mean", "--device", "cpu"]
    split = ["--split-by", "row", "--val", "0", "--test", "0"]
    embed_it = ["embed", str(path), "--cache", str(cache), *model, *split, "--tokens", "all", "--dtype", "int8"]
    planned = CliRunner().invoke(app, [*embed_it, "--plan"])
    assert planned.exit_code == 0, planned.output
    assert "for the states of single tokens" in planned.stdout
    assert not cache.exists()
    done = CliRunner().invoke(app, embed_it)
    assert "lowest cosine to what was computed" in done.stdout
    verified = CliRunner().invoke(app, ["cache", "verify", str(cache), "--reencode", "9", *model, "--json"])
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["lowest_cosine"] > 0.998
    other = CliRunner().invoke(app, ["cache", "verify", str(cache), "--reencode", "9", *model[:2]])
    assert other.exit_code == 2
    assert "the nearest differs in pooling" in " ".join(other.output.split())
