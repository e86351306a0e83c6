"""Stage 1: every distinct text once, and what a run says of it."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palcache.cache import Cache
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import EmbedProgress, embed_comparisons, plan_embedding
from palcache.encoders import Role
from palcache.errors import InputError, PalcacheWarning
from palcache.storage.shards import TRUNCATED
from tests.embedding.runs import CONFIG, ROLES, SHARD_ROWS, assert_holds, leftovers, run, space_of
from tests.stubs import MAX_WORDS, StubEncoder, contents, small_table, texts_of


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_text_gets_its_vector(folder: Path, dtype: Any, workers: int) -> None:
    """Each distinct text is encoded once per role and found by its content, whatever the stored type."""
    table, encoder = small_table(), StubEncoder(batch_sensitive=False, workers=workers)
    summary = run(folder, table, encoder, EmbedConfig(shard_rows=SHARD_ROWS, dtype=dtype))
    assert verify_cache(Cache(folder)).problems == ()
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 0}[dtype]
    for role in ROLES:
        space, texts = space_of(folder, role), texts_of(table, role)
        assert len(space) == len(texts)
        expected = np.stack([encoder.vector(text, role) for text in texts])
        np.testing.assert_allclose(space.tensor().float().numpy(), expected, atol=tolerance)
        np.testing.assert_allclose(space.norms(), np.linalg.norm(expected, axis=1), rtol=1e-6)
        words = [len(text.split()) + (role == "prompt") for text in texts]
        n_tokens = np.concatenate([shard.n_tokens for shard in space.shards])
        flags = np.concatenate([shard.flags for shard in space.shards])
        assert n_tokens.tolist() == [min(count, MAX_WORDS) for count in words]
        assert flags.tolist() == [TRUNCATED if count > MAX_WORDS else 0 for count in words]
    assert summary.encoded == 5 + 13
    assert leftovers(folder) == []


def test_the_summary_counts(folder: Path) -> None:
    """References, distinct texts, hits and savings add up; bytes are those on the disk."""
    table, encoder = small_table(), StubEncoder()
    first = run(folder, table, encoder)
    assert (first.references, first.distinct) == (3 * 27, {"prompt": 5, "response": 13})
    assert (first.hits, first.encoded, first.repeats_saved, first.failed) == (0, 18, 63, 0)
    assert first.tokens == sum(
        min(len(text.split()) + (role == "prompt"), MAX_WORDS) for role in ROLES for text in texts_of(table, role)
    )
    assert first.padded >= first.tokens
    assert first.truncated == sum(
        len(text.split()) + (role == "prompt") > MAX_WORDS for role in ROLES for text in texts_of(table, role)
    )
    assert first.truncated > 0
    assert first.new_bytes == sum(path.stat().st_size for path in folder.glob("spaces/*/shards/*.h5"))
    assert set(first.seconds) == {"total", "keys", "encode", "tokenize", "wait", "forward", "write", "device"}
    before = contents(folder)
    second = run(folder, table, encoder)
    assert (second.hits, second.encoded, second.new_bytes, second.repeats_saved) == (18, 0, 0, 81)
    assert contents(folder) == before, "a run with nothing to do changed the cache"


def test_batches_keep_to_the_budget(folder: Path) -> None:
    """No batch computes more padded tokens than asked for."""
    encoder = StubEncoder(memory=20, batch_sensitive=False)
    run(folder, None, encoder, EmbedConfig(shard_rows=9, token_budget=20))
    assert max(encoder.batches) > 1
    assert_holds(folder, small_table(), encoder)


def test_equal_lengths_are_kept(folder: Path) -> None:
    """An encoder whose vectors padding would change gets batches of one length."""
    seen: list[set[int]] = []

    class Watching:
        """Notes the lengths in each batch."""

        def __init__(self, stub: StubEncoder) -> None:
            self._stub = stub

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stub, name)

        def encode(self, window: Any, rows: Any, role: Role) -> torch.Tensor:
            seen.append(set(window.n_tokens[rows].tolist()))
            return self._stub.encode(window, rows, role)

    embed_comparisons(
        small_table(2, 40),
        Watching(StubEncoder(equal_lengths=True)),
        Cache.create(folder),
        name="t",
        config=EmbedConfig(),
    )
    assert all(len(lengths) == 1 for lengths in seen)
    assert len(seen) < 2 + 40


def test_a_second_table_encodes_only_what_is_new(folder: Path) -> None:
    """Texts are found by content, across tables and runs; the first table's shards stay as they are."""
    encoder = StubEncoder(batch_sensitive=False, log=folder / "log")
    first, second = small_table(4, 6), small_table(6, 11)
    shared = [len(set(texts_of(first, role)) & set(texts_of(second, role))) for role in ROLES]
    assert min(shared) > 0
    run(folder / "cache", first, encoder, name="first")
    before = contents(folder / "cache")
    summary = run(folder / "cache", second, encoder, name="second")
    assert summary.hits == sum(shared)
    assert summary.encoded == 6 + 11 - sum(shared)
    assert set(Counter((folder / "log").read_text().splitlines()).values()) == {1}
    shards = {name: content for name, content in before.items() if "/shards/" in name or name == "comparisons/first.h5"}
    assert shards.items() <= contents(folder / "cache").items()
    assert_holds(folder / "cache", first, encoder, "first")
    assert_holds(folder / "cache", second, encoder, "second")


def test_encoders_do_not_mix(folder: Path) -> None:
    """Another encoder or stored type fills other spaces; the table knows all of them."""
    table = small_table()
    run(folder, table, StubEncoder())
    run(folder, table, StubEncoder(identity="other"))
    run(folder, table, StubEncoder(), EmbedConfig(shard_rows=SHARD_ROWS, dtype="bfloat16"))
    cache = Cache(folder)
    assert len(cache.space_ids) == 6
    assert len(cache.comparisons("table").spaces) == 3


def test_a_prompt_that_is_also_a_response_is_two_items(folder: Path) -> None:
    """Roles have spaces of their own, because models prefix queries and documents differently."""
    table = Comparisons.from_rows(
        [{"user_id": "u", "prompt": "same words", "response_1": "same words", "response_2": "other", "y": 1}]
    )
    encoder = StubEncoder(batch_sensitive=False)
    run(folder, table, encoder)
    assert_holds(folder, table, encoder)
    assert not torch.equal(space_of(folder, "prompt").tensor()[0], space_of(folder, "response").tensor()[0])


def test_progress_ends_where_it_said(folder: Path) -> None:
    """Each role's texts and tokens count up to their totals, which are right from the first shard on."""
    events: list[EmbedProgress] = []
    summary = run(folder, on_progress=events.append)
    for role, count in (("prompt", 5), ("response", 13)):
        of_role = [event for event in events if event.role == role]
        assert [event.texts for event in of_role] == sorted(event.texts for event in of_role)
        assert {event.texts_total for event in of_role} == {count}
        last = of_role[-1]
        assert (last.texts, last.tokens) == (last.texts_total, last.tokens_total)
    assert sum(event.role == "response" for event in events) == len(
        [event for event in events if event.role == "response"]
    )
    assert summary.tokens == sum([event for event in events if event.role == role][-1].tokens for role in ROLES)


def test_a_plan_says_what_a_run_does_and_writes_nothing(folder: Path) -> None:
    """On a new cache and on one that has some of the texts."""
    first, second = small_table(4, 6), small_table(6, 11)
    for table, cache in ((first, None), (second, folder / "cache")):
        before = contents(folder)
        plan = plan_embedding(table, StubEncoder(), Cache(cache) if cache else None, config=CONFIG)
        assert contents(folder) == before
        done = run(folder / "cache", table)
        for name in ("references", "distinct", "hits", "encoded", "truncated", "tokens", "spaces"):
            assert getattr(plan, name) == getattr(done, name), name
        assert plan.new_bytes == pytest.approx(done.new_bytes, rel=0.15)
    rough = plan_embedding(small_table(9, 90), StubEncoder(), None, sample=30)
    exact = plan_embedding(small_table(9, 90), StubEncoder(), None)
    assert rough.tokens == pytest.approx(exact.tokens, rel=0.3)


def test_a_name_that_cannot_be_stored_is_refused_at_once(folder: Path) -> None:
    """Not after hours of encoding."""
    encoder = StubEncoder()
    with pytest.raises(InputError, match=r"Got the table name 'a/b'; expected a file name"):
        run(folder, None, encoder, name="a/b")
    assert encoder.batches == []


def test_another_table_of_the_same_name_is_replaced_with_a_word(folder: Path) -> None:
    """The same table, and a table of another name, are stored without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PalcacheWarning)
        for _ in range(2):
            run(folder / "cache", small_table(4, 6))
    with pytest.warns(
        PalcacheWarning, match=r"had other comparisons or another split and was replaced: .* give --name"
    ):
        run(folder / "cache", small_table(5, 7))
