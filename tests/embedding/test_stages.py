"""Stage 1 in one call: files in, cache out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palcache.cache import Cache
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, SplitConfig
from palcache.embedding.encoding import EmbedProgress
from palcache.embedding.stages import embed_tables
from palcache.errors import InputError, ModelError
from tests.stubs import StubEncoder, contents, small_table
from tests.tiny_models import build_tiny_model

SPLIT = SplitConfig(val=0.2, test=0.2)


def write_table(path: Path, table: Comparisons, worker: str = "user_id") -> Path:
    """Write a table as JSON Lines."""
    responses = table.responses.to_pylist()
    rows = [
        {worker: user, "prompt": prompt, "response_1": responses[left], "response_2": responses[right], "y": int(y)}
        for user, prompt, left, right, y in zip(
            table.users.to_list(), table.prompts.to_list(), table.response_1, table.response_2, table.y, strict=True
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_become_a_cache(tmp_path: Path) -> None:
    """Several files are one table, named after the first; how it was read and split stands beside it."""
    files = [
        write_table(tmp_path / "spring.jsonl", small_table(4, 9), worker="worker"),
        write_table(tmp_path / "autumn.jsonl", small_table(6, 11), worker="worker"),
    ]
    events: list[EmbedProgress] = []
    summary = embed_tables(
        files,
        tmp_path / "cache",
        split=SPLIT,
        columns={"user_id": "worker"},
        encoder=StubEncoder(),
        on_progress=events.append,
    )
    cache = Cache(tmp_path / "cache")
    stored = cache.comparisons()
    assert stored.name == "spring"
    assert stored.about == {"split": SPLIT.to_dict(), "ties": "refuse"}
    assert len(stored.comparisons) == 19 + 23
    assert stored.comparisons.split is not None
    assert set(stored.comparisons.split.to_list()) == {"train", "val", "test"}
    assert summary.references == 3 * 42
    stages = {"read", "total", "keys", "encode", "tokenize", "wait", "forward", "write", "device"}
    assert set(summary.seconds) == stages
    assert {event.role for event in events} == {"prompt", "response"}
    assert verify_cache(cache).problems == ()


def test_comparisons_at_hand_need_no_file(tmp_path: Path) -> None:
    """They are stored under the name given, or as `comparisons`."""
    for name, stored in ((None, "comparisons"), ("mine", "mine")):
        embed_tables(small_table(), tmp_path, name=name, split=SPLIT, encoder=StubEncoder())
        assert stored in Cache(tmp_path).comparison_names


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    """Neither where there is no cache nor where there is one; what it says is what happens."""
    path = write_table(tmp_path / "table.jsonl", small_table())
    for _ in range(2):
        before = contents(tmp_path)
        plan = embed_tables([path], tmp_path / "cache", split=SPLIT, encoder=StubEncoder(), plan=True)
        assert contents(tmp_path) == before
        done = embed_tables([path], tmp_path / "cache", split=SPLIT, encoder=StubEncoder())
        assert (plan.encoded, plan.hits, plan.tokens) == (done.encoded, done.hits, done.tokens)
        assert set(plan.seconds) == {"read"}


def test_nothing_is_written_for_input_that_is_refused(tmp_path: Path) -> None:
    """A missing table, a missing model and a folder of other things leave no trace."""
    encoder = StubEncoder()
    with pytest.raises(InputError, match=r"gone.jsonl does not exist"):
        embed_tables([tmp_path / "gone.jsonl"], tmp_path / "cache", encoder=encoder)
    with pytest.raises(ModelError, match=r"There is no model folder .*nowhere/model"):
        embed_tables(small_table(), tmp_path / "cache", split=SPLIT, config=EmbedConfig(model="./nowhere/model"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists and is not a cache"):
        embed_tables(small_table(), tmp_path, split=SPLIT, encoder=encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert encoder.batches == []


def test_the_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    """Without an encoder at hand, the configuration's model is loaded and timed."""
    model = build_tiny_model(tmp_path / "tiny")
    config = EmbedConfig(model=str(model), device="cpu", max_tokens=9)
    summary = embed_tables(small_table(), tmp_path / "cache", split=SPLIT, config=config)
    assert summary.seconds["model"] > 0
    cache = Cache(tmp_path / "cache")
    assert cache.about(cache.space_ids[0])["model"] == "tiny"
    assert verify_cache(cache).problems == ()
