"""Splits keep a unit in one part, for ever: however the table is ordered, and however it grows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.comparisons import SPLITS, Column, Comparisons
from palcache.configs import SplitBy, SplitConfig
from palcache.errors import InputError
from palcache.splits import split_comparisons

Row = dict[str, Any]
UNITS: dict[SplitBy, Callable[[Row], Any]] = {
    "pair": lambda row: (row["prompt"], frozenset((row["response_1"], row["response_2"]))),
    "row": lambda row: (row["user_id"], row["prompt"], frozenset((row["response_1"], row["response_2"]))),
    "prompt": lambda row: row["prompt"],
    "user": lambda row: row["user_id"],
}
EVERY = list(UNITS)


def judged(n: int, *, users: int = 31, prompts: int = 37, responses: int = 5, seed: int = 0) -> list[Row]:
    """Draw rows in which pairs repeat, in both orders; all prompts share their responses."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        left, right = generator.permutation(responses)[:2]
        rows.append(
            {
                "user_id": f"u{generator.integers(users)}",
                "prompt": f"p{generator.integers(prompts)}",
                "response_1": f"r{left}",
                "response_2": f"r{right}",
                "y": int(generator.choice([-1, 1])),
            }
        )
    return rows


def splits_of(rows: Sequence[Row], **options: Any) -> list[str]:
    split = split_comparisons(Comparisons.from_rows(rows), SplitConfig(**options)).split
    assert split is not None
    return split.to_list()


def parts(rows: Sequence[Row], unit: Callable[[Row], Any], splits: Sequence[str]) -> dict[Any, set[str]]:
    """Return the splits in which each unit has rows."""
    found = defaultdict(set)
    for row, split in zip(rows, splits, strict=True):
        found[unit(row)].add(split)
    return found


@pytest.mark.parametrize("by", EVERY)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_unit_stays_in_one_split(by: SplitBy, seed: int) -> None:
    rows = judged(1_500)
    splits = splits_of(rows, by=by, seed=seed, val=0.2, test=0.3)
    assert set(splits) == set(SPLITS)
    assert all(len(where) == 1 for where in parts(rows, UNITS[by], splits).values())


def test_auto_splits_by_pair_so_that_no_pair_in_either_order_is_in_two_splits() -> None:
    rows = judged(1_500)
    assert splits_of(rows) == splits_of(rows, by="pair")
    turned = [row | {"response_1": row["response_2"], "response_2": row["response_1"], "y": -row["y"]} for row in rows]
    splits = splits_of([*rows, *turned])
    assert splits[: len(rows)] == splits[len(rows) :] == splits_of(rows)


@pytest.mark.parametrize(("by", "coarser"), [("row", "pair"), ("pair", "prompt")])
def test_a_finer_unit_is_really_finer(by: SplitBy, coarser: SplitBy) -> None:
    """A negative control: splitting by rows does put pairs on both sides."""
    rows = judged(1_500)
    assert any(len(where) > 1 for where in parts(rows, UNITS[coarser], splits_of(rows, by=by)).values())


@pytest.mark.parametrize("by", EVERY)
def test_a_unit_keeps_its_split_when_rows_are_reordered(by: SplitBy) -> None:
    rows = judged(600)
    order = np.random.default_rng(1).permutation(len(rows))
    splits = splits_of(rows, by=by)
    assert splits_of([rows[i] for i in order], by=by) == [splits[i] for i in order]


@pytest.mark.parametrize("by", EVERY)
def test_a_unit_keeps_its_split_when_the_table_grows(by: SplitBy) -> None:
    rows, more = judged(600), judged(500, users=41, prompts=43, responses=7, seed=3)
    splits = splits_of(rows, by=by)
    assert splits_of([*rows, *more], by=by)[: len(rows)] == splits
    assert splits_of([*more, *rows], by=by)[len(more) :] == splits


@pytest.mark.parametrize("by", EVERY)
def test_a_larger_test_share_takes_no_row_out_of_test(by: SplitBy) -> None:
    rows = judged(600)
    small, large = splits_of(rows, by=by, test=0.2), splits_of(rows, by=by, test=0.4)
    assert all(later == "test" for before, later in zip(small, large, strict=True) if before == "test")


@pytest.mark.parametrize("by", EVERY)
@pytest.mark.parametrize("seed", [0, 7])
def test_shares_are_about_right(by: SplitBy, seed: int) -> None:
    """4,000 units of one row each: the shares stay within four standard deviations."""
    n = 4_000
    rows = [
        {"user_id": f"u{i}", "prompt": f"p{i}", "response_1": f"a{i}", "response_2": f"b{i}", "y": 1} for i in range(n)
    ]
    splits = splits_of(rows, by=by, seed=seed, val=0.15, test=0.25)
    for split, share in {"train": 0.6, "val": 0.15, "test": 0.25}.items():
        assert abs(splits.count(split) / n - share) < 4 * np.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("by", EVERY)
def test_seeds_draw_independently(by: SplitBy) -> None:
    n = 2_000
    rows = [
        {"user_id": f"u{i}", "prompt": f"p{i}", "response_1": f"a{i}", "response_2": f"b{i}", "y": 1} for i in range(n)
    ]
    first, second = (np.array(splits_of(rows, by=by, seed=seed, val=0, test=0.5)) == "test" for seed in (1, 2))
    assert abs(np.mean(first & second) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)


def test_pairs_of_one_prompt_are_drawn_independently() -> None:
    """Prompt and responses both enter the draw of a pair."""
    rows = [
        {"user_id": "u", "prompt": f"p{i % 40}", "response_1": f"r{i // 40}", "response_2": f"r{i // 40 + 1}", "y": 1}
        for i in range(2_000)
    ]
    test = (np.array(splits_of(rows, val=0, test=0.5)) == "test").reshape(50, 40)
    for axis in (0, 1):
        assert 0.2 < test.mean(axis).min() < test.mean(axis).max() < 0.8


def test_named_pairs_stay_together_whatever_their_texts() -> None:
    """`pair_id` joins rows, and so does a pair that stands under two names: whole connected sets."""
    rows = judged(400, prompts=97, responses=7)
    for i, row in enumerate(rows):
        row["pair_id"] = f"n{i // 4}"
    splits = splits_of(rows, val=0.2, test=0.3)
    labels = list(range(len(rows)))
    for unit in (UNITS["pair"], lambda row: row["pair_id"]):
        for same in [[i for i, row in enumerate(rows) if unit(row) == key] for key in {unit(row) for row in rows}]:
            merged = {labels[i] for i in same}
            labels = [min(merged) if label in merged else label for label in labels]
    where = defaultdict(set)
    for label, split in zip(labels, splits, strict=True):
        where[label].add(split)
    assert all(len(found) == 1 for found in where.values())
    assert len(where) > 1


def test_a_long_chain_of_names_is_one_unit() -> None:
    """Row i has the texts of row i - 1 or its name, so that all of them hang together."""
    rows = [
        {
            "user_id": "u",
            "prompt": f"p{i // 2}",
            "response_1": "a",
            "response_2": "b",
            "y": 1,
            "pair_id": f"n{(i + 1) // 2}",
        }
        for i in range(301)
    ]
    assert len(set(splits_of([*rows, *judged_alone(40)], val=0.3, test=0.3)[:301])) == 1


def judged_alone(n: int) -> list[Row]:
    """Return rows that have nothing in common."""
    return [
        {"user_id": "u", "prompt": f"q{i}", "response_1": "a", "response_2": "b", "y": 1, "pair_id": f"m{i}"}
        for i in range(n)
    ]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=14), st.integers(0, 99))
def test_rows_that_share_a_pair_or_a_name_never_part(edges: list[tuple[int, int]], seed: int) -> None:
    rows = [
        row | {"prompt": f"p{pair}", "pair_id": f"n{name}"}
        for (pair, name), row in zip(edges, judged_alone(99), strict=False)
    ]
    splits = splits_of([*rows, *judged_alone(60)], seed=seed, val=0.3, test=0.3)[: len(rows)]
    for first, one in zip(rows, splits, strict=True):
        for second, other in zip(rows, splits, strict=True):
            if first["prompt"] == second["prompt"] or first["pair_id"] == second["pair_id"]:
                assert one == other


def test_named_pairs_keep_their_split_when_the_table_grows_by_others() -> None:
    rows = judged_alone(90)
    assert splits_of([*judged_alone(150)[90:], *rows])[60:] == splits_of(rows)


@pytest.mark.parametrize("by", ["auto", "column"])
def test_the_column_of_a_table_is_kept(by: SplitBy) -> None:
    rows = [row | {"split": name} for row, name in zip(judged(3), ("support", "query", "train"), strict=True)]
    assert splits_of(rows, by=by) == ["support", "query", "train"]


def test_the_column_of_a_table_is_replaced_when_another_unit_is_asked() -> None:
    rows = judged(600)
    assert splits_of([row | {"split": "train"} for row in rows], by="prompt") == splits_of(rows, by="prompt")


def test_a_missing_column_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^--split-by column was asked, but the table has no column split; add one or"
    ):
        splits_of(judged(3), by="column")


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^Got --split-by debate; expected one of auto, row, pair, prompt, user, column\."
    ):
        splits_of(judged(3), by="debate")


def test_an_empty_split_is_refused() -> None:
    expected = (
        r"^The split val is left empty: 50 comparisons make 1 distinct units by user, and none of them fell into a share of "
        r"0\.10; split by something finer, raise the share, or give more data\.$"
    )
    with pytest.raises(InputError, match=expected):
        splits_of(judged(50, users=1), by="user", test=0)
    with pytest.raises(InputError, match="The split train is left empty: 3 comparisons make"):
        splits_of(judged(3), by="row", val=0, test=0.999)


def test_a_split_of_share_zero_may_be_empty() -> None:
    assert set(splits_of(judged(50, users=1), by="user", val=0, test=0)) == {"train"}


def test_nothing_but_the_split_changes() -> None:
    comparisons = Comparisons.from_rows(judged(200))
    divided = split_comparisons(comparisons, SplitConfig())
    assert comparisons.split is None
    assert divided.split is not None
    assert divided.split.values.to_pylist() == list(SPLITS)
    plain = Column.of(["train"] * 200)
    assert divided.with_split(plain).fingerprint() == comparisons.with_split(plain).fingerprint()


def test_draws_never_change() -> None:
    """A table that is embedded again is divided as before."""
    names = "".join(split[1] for split in splits_of(judged_alone(24), val=0.3, test=0.3, seed=5))
    plain = [{name: value for name, value in row.items() if name != "pair_id"} for row in judged_alone(24)]
    assert names == "eearraarrraereraereeaara"
    assert "".join(split[1] for split in splits_of(plain, val=0.3, test=0.3, seed=5)) == "rereareeaeaeaeraeraaraar"
