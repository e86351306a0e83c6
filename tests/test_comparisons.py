"""Comparisons hold exactly what the rows said, each text once; rows that cannot be used are named."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.columns import Place, form_of, normalise, texts_of
from palcache.comparisons import OPTIONAL, Column, Comparisons, Ties
from palcache.errors import InputError, PalcacheWarning

Row = dict[str, Any]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda text: not text.isspace()
)
PLACE = Place("table.csv")


@st.composite
def tables(draw: st.DrawFn) -> list[Row]:
    """Draw rows from few texts, so that they repeat, with any of the optional columns."""
    texts = draw(st.lists(TEXTS, min_size=2, max_size=5, unique=True))
    names = draw(st.lists(TEXTS, min_size=1, max_size=3, unique=True))
    optional = draw(st.lists(st.sampled_from(OPTIONAL), unique=True))
    rows: list[Row] = []
    for _ in range(draw(st.integers(1, 7))):
        pair = draw(st.permutations(texts))
        row: Row = {"user_id": draw(st.sampled_from(names)), "prompt": draw(st.sampled_from(texts))}
        row |= {"response_1": pair[0], "response_2": pair[1], "y": draw(st.sampled_from([-1, 1]))}
        rows.append(row | {name: draw(st.sampled_from(names)) for name in optional})
    return rows


def to_rows(comparisons: Comparisons) -> list[Row]:
    """Return the rows that made comparisons."""
    responses = comparisons.responses.to_pylist()
    columns: dict[str, list[Any]] = {
        "user_id": comparisons.users.to_list(),
        "prompt": comparisons.prompts.to_list(),
        "response_1": [responses[code] for code in comparisons.response_1],
        "response_2": [responses[code] for code in comparisons.response_2],
        "y": comparisons.y.tolist(),
    }
    for name in OPTIONAL:
        column: Column | None = getattr(comparisons, name)
        if column is not None:
            columns[name] = column.to_list()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def row(number: int = 0, **changes: Any) -> Row:
    """Return a valid row."""
    valid = {"user_id": "ann", "prompt": "why?", "response_1": f"a{number}", "response_2": f"b{number}", "y": 1}
    return valid | changes


def trl(n: int) -> list[Row]:
    return [
        {"user_id": f"u{i % 7}", "prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)
    ]


@settings(deadline=None, max_examples=80)
@given(tables())
def test_rows_round_trip(rows: list[Row]) -> None:
    comparisons = Comparisons.from_rows(rows)
    assert to_rows(comparisons) == rows
    assert len(comparisons) == len(rows)


@settings(deadline=None, max_examples=40)
@given(tables())
def test_every_text_is_stored_once_in_order_of_appearance(rows: list[Row]) -> None:
    comparisons = Comparisons.from_rows(rows)
    sides = [row["response_1"] for row in rows] + [row["response_2"] for row in rows]
    assert comparisons.responses.to_pylist() == list(dict.fromkeys(sides))
    assert comparisons.prompts.values.to_pylist() == list(dict.fromkeys(row["prompt"] for row in rows))
    assert comparisons.users.values.to_pylist() == list(dict.fromkeys(row["user_id"] for row in rows))
    assert comparisons.response_1.dtype == comparisons.users.codes.dtype == np.int32
    assert comparisons.y.dtype == np.int8


@settings(deadline=None, max_examples=60)
@given(tables(), st.data())
def test_take_keeps_the_rows_and_only_their_texts(rows: list[Row], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    taken = Comparisons.from_rows(rows).take(np.array(chosen, np.int64))
    expected = [rows[i] for i in chosen]
    assert to_rows(taken) == expected
    assert set(taken.responses.to_pylist()) == {row[side] for row in expected for side in ("response_1", "response_2")}
    assert set(taken.prompts.values.to_pylist()) == {row["prompt"] for row in expected}
    assert all((getattr(taken, name) is not None) == (name in rows[0]) for name in OPTIONAL)


def test_take_accepts_a_mask() -> None:
    rows = [row(i, split="train") for i in range(5)]
    mask = np.array([True, False, False, True, True])
    assert to_rows(Comparisons.from_rows(rows).take(mask)) == list(itertools.compress(rows, mask))


def test_with_split_changes_the_split_alone() -> None:
    rows = [row(i, group="g") for i in range(3)]
    split = Comparisons.from_rows(rows).with_split(Column.of(["train", "val", "train"]))
    expected = [{**row, "split": name} for row, name in zip(rows, ["train", "val", "train"], strict=True)]
    assert to_rows(split) == expected


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(TEXTS, max_size=4), max_size=4))
def test_column_encode_joins_chunks(chunks: list[list[str]]) -> None:
    column = Column.encode(pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string()))
    texts = [text for chunk in chunks for text in chunk]
    assert column.to_list() == texts
    assert column.values.to_pylist() == list(dict.fromkeys(texts))
    assert len(column) == len(texts)
    assert column.values.type == pa.large_string()


@settings(deadline=None, max_examples=30)
@given(tables())
def test_fingerprint_ignores_how_texts_are_numbered(rows: list[Row]) -> None:
    comparisons = Comparisons.from_rows(rows)
    backwards = np.arange(len(rows))[::-1]
    renumbered = comparisons.take(backwards).take(backwards)
    assert renumbered.fingerprint() == comparisons.fingerprint()
    again = Comparisons.from_rows([dict(reversed(row.items())) for row in rows])
    assert again.fingerprint() == comparisons.fingerprint()


@pytest.mark.parametrize("field", ["user_id", "prompt", "response_1", "response_2", "y", *OPTIONAL])
def test_fingerprint_depends_on_every_field(field: str) -> None:
    rows = [row(i, **dict.fromkeys(OPTIONAL, "train")) for i in range(3)]
    changed = [*rows[:2], rows[2] | {field: -1 if field == "y" else "another"}]
    assert Comparisons.from_rows(changed).fingerprint() != Comparisons.from_rows(rows).fingerprint()


def test_fingerprint_depends_on_the_order_of_rows_and_sides() -> None:
    comparisons = Comparisons.from_rows([row(i) for i in range(3)])
    swapped = replace(comparisons, response_1=comparisons.response_2, response_2=comparisons.response_1)
    turned = comparisons.take(np.array([1, 0, 2]))
    assert len({table.fingerprint() for table in (comparisons, swapped, turned)}) == 3


def test_fingerprint_never_changes() -> None:
    """Caches on disk are checked against it."""
    comparisons = Comparisons.from_rows([row(i, split="test", pair_id=7) for i in range(2)])
    assert comparisons.fingerprint() == "07c0870c854f169524703ca08f12d694"


def test_several_tables_become_one() -> None:
    first, second = [row(i) for i in range(3)], [row(i, user_id="bob") for i in range(2, 7)]
    joined = Comparisons.from_tables([normalise(pa.Table.from_pylist(rows), PLACE) for rows in (first, second)])
    assert to_rows(joined) == first + second


def test_an_optional_column_in_only_some_tables_is_refused() -> None:
    parts = [normalise(pa.Table.from_pylist([row(i)]), PLACE) for i in range(3)]
    parts.append(normalise(pa.Table.from_pylist([row(group="g")]), PLACE))
    with pytest.raises(
        InputError, match=r"^The column group stands in 1 of 4 files; give it to all of them or none\.$"
    ):
        Comparisons.from_tables(parts)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (-1, -1), (1, 1), (-1.0, -1), (1.0, 1), ("-1", -1), ("+1", 1), (" 1.0 ", 1), (np.int64(1), 1), (np.float32(-1), -1)
    ],
)  # fmt: skip
def test_answers_that_are_understood(given_: Any, expected: int) -> None:
    assert Comparisons.from_rows([row(y=given_)]).y.tolist() == [expected]


@pytest.mark.parametrize(
    "column", [pa.array([-1, 1], pa.int8()), pa.array([-1, 1], pa.float32()), pa.array(["-1", "+1"])]
)
def test_typed_columns_of_answers(column: pa.Array) -> None:
    table = pa.Table.from_pylist([row(0), row(1)]).set_column(4, "y", column)
    assert Comparisons.from_tables([normalise(table, PLACE)]).y.tolist() == [-1, 1]


@pytest.mark.parametrize("bad", [2, -2, 0.5, "left", True, "++1", "+-1", "1e0", "", 10**30, float("inf")])
def test_other_answers_are_refused(bad: Any) -> None:
    shown = re.escape("true" if bad is True else str(bad))
    expected = (
        rf"^rows, row 2: has y = '{shown}'; expected -1 \(response_1 preferred\) or \+1 \(response_2 preferred\)\.$"
    )
    with pytest.raises(InputError, match=expected):
        Comparisons.from_rows([row(0), row(1, y=bad)])


@pytest.mark.parametrize("missing", [None, float("nan"), np.float64("nan")])
def test_a_missing_answer_is_refused(missing: Any) -> None:
    with pytest.raises(InputError, match=r"^rows, row 2: has no y; expected -1 \(response_1 preferred\)"):
        Comparisons.from_rows([row(0), row(1, y=missing)])


@pytest.mark.parametrize("field", ["user_id", "prompt", "response_1", "response_2", *OPTIONAL])
@pytest.mark.parametrize("value", ["", "  ", "\t\n\u3000", None, float("nan")], ids=repr)
def test_empty_and_missing_values_are_refused(field: str, value: Any) -> None:
    rows = [row(i, **dict.fromkeys(OPTIONAL, "train")) for i in range(5)]
    rows[2][field] = rows[4][field] = value
    what = "an empty" if isinstance(value, str) else "no"
    expected = rf"^votes, row 3: has {what} {field}; expected a non-empty text \(2 such rows in all\)\.$"
    with pytest.raises(InputError, match=expected):
        Comparisons.from_rows(rows, origin="votes")


def test_not_a_number_is_missing_in_typed_columns() -> None:
    users = pa.array([3.0, float("nan")])
    with pytest.raises(InputError, match=r"^table\.csv, row 2: has no user_id; expected a non-empty text\.$"):
        normalise(pa.Table.from_pylist([row(0), row(1)]).set_column(0, "user_id", users), PLACE)
    with pytest.raises(InputError, match=r"^table\.csv, row 2: has no y; expected -1"):
        normalise(pa.Table.from_pylist([row(0), row(1)]).set_column(4, "y", pa.array([1, float("nan")])), PLACE)


def test_a_value_that_only_some_rows_have_is_refused() -> None:
    with pytest.raises(InputError, match=r"^rows, row 1: has no group; expected a non-empty text\.$"):
        Comparisons.from_rows([row(0), row(1, group="g")])


@pytest.mark.parametrize("value", [["a"], {"role": "user"}, (1, 2), pytest.param(object(), id="object")], ids=repr)
def test_nested_values_are_refused(value: Any) -> None:
    expected = rf"^rows, row 2: prompt is of type {type(value).__name__}; expected plain text: render conversations"
    with pytest.raises(InputError, match=expected):
        Comparisons.from_rows([row(0), row(1, prompt=value)])


def test_nested_columns_are_refused() -> None:
    table = pa.Table.from_pylist([row(0, prompt=[{"role": "user", "content": "hi"}])])
    with pytest.raises(InputError, match=r"^table\.csv: the column prompt holds list<.*>, expected plain text; render"):
        normalise(table, PLACE)
    with pytest.raises(InputError, match=r"^table\.csv: the column y holds list<.*>; expected -1"):
        normalise(pa.Table.from_pylist([row(0, y=[1])]), PLACE)


def test_texts_that_are_not_unicode_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"^rows, row 2: response_2 is not Unicode text \(.*surrogates.*\); repair it\.$"
    ):
        Comparisons.from_rows([row(0), row(1, response_2="half \ud83e of a pair")])
    offsets, data = pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ok\xff\xfe")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    table = pa.Table.from_pylist([row(0), row(1)]).set_column(1, "prompt", broken)
    with pytest.raises(InputError, match=r"^table\.csv: the column prompt holds string, expected text \(Invalid UTF8"):
        normalise(table, PLACE)


def test_numbers_and_truth_values_become_texts_as_in_typed_files() -> None:
    values = [7, 7.0, 7.5, True, "007", 2**70, np.int32(3), np.bool_(False), np.float64(2)]
    assert texts_of(values, "user_id", PLACE).to_pylist() == [
        "7", "7", "7.5", "true", "007", str(2**70), "3", "false", "2"
    ]  # fmt: skip
    for column in ([7, -3], [7.0, 7.5], [True, False]):
        typed = normalise(pa.Table.from_pylist([row(i, user_id=user) for i, user in enumerate(column)]), PLACE)
        assert typed["user_id"].to_pylist() == texts_of(column, "user_id", PLACE).to_pylist()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["user_id", "prompt", "response_1", "y"],
            "lacks the column(s) response_2; it has prompt, response_1, user_id, y:",
        ),
        (["user_id", "prompt", "chosen"], "lacks the column(s) rejected; it has chosen, prompt, user_id:"),
        ([], "lacks the column(s) user_id, prompt, response_1, response_2, y; it has none:"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=rf"^votes\.csv {re.escape(message)} rename columns with --map, for example"):
        form_of(names, "votes.csv")


def test_a_missing_key_of_rows_is_named_with_those_that_are_there() -> None:
    rows = [{"worker": 3, "prompt": "p", "response_1": "a", "response_2": "b", "y": 1}]
    expected = (
        r"^votes lacks the column\(s\) user_id; it has prompt, response_1, response_2, worker, y: .* --map user_id="
    )
    with pytest.raises(InputError, match=expected):
        Comparisons.from_rows(rows, origin="votes")


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"^votes are empty; give at least one comparison\.$"):
        Comparisons.from_rows([], origin="votes")


TIES = [row(0, y=0), row(1, y=-1), row(2, y="0.0"), row(3, y=-0.0)]


@pytest.mark.parametrize(("ties", "kept"), [("drop", [1]), ("half", [0, 1, 2, 3])])
def test_ties_are_dropped_or_kept(ties: Ties, kept: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparisons = Comparisons.from_rows(TIES, ties=ties)
    assert to_rows(comparisons) == [TIES[i] | {"y": int(float(TIES[i]["y"]))} for i in kept]


def test_ties_are_refused_by_default() -> None:
    expected = r"^rows, row 1: has y = 0, a tie; .* choose --ties drop or --ties half \(3 such rows in all\)\.$"
    with pytest.raises(InputError, match=expected):
        Comparisons.from_rows(TIES)


def test_ties_alone_leave_nothing_to_drop_to() -> None:
    with pytest.raises(InputError, match=r"^No comparison is left once ties and pairs of identical responses are out"):
        Comparisons.from_rows([row(0, y=0)], ties="drop")


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InputError, match=r"^Got the tie policy 'keep'; expected one of refuse, drop, half\.$"):
        Comparisons.from_rows([row(0)], ties="keep")  # type: ignore[arg-type]


def test_identical_responses_are_left_out_with_one_warning() -> None:
    rows = [row(i) for i in range(6)]
    for i in (1, 4):
        rows[i] |= {"response_1": "same", "response_2": "same"}
    rows[4]["y"] = 0  # no tie between two responses, because there is only one
    expected = (
        r"^rows, row 2: two identical responses hold no preference, so the row is left out \(2 such rows in all\)\.$"
    )
    with pytest.warns(PalcacheWarning, match=expected) as caught:
        comparisons = Comparisons.from_rows(rows)
    assert len(caught) == 1
    assert to_rows(comparisons) == [rows[i] for i in (0, 2, 3, 5)]
    assert "same" not in comparisons.responses.to_pylist()


def test_identical_prompt_and_response_are_no_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Comparisons.from_rows([row(0, prompt="a0")])) == 1


def test_numbers_name_the_rows_of_the_file() -> None:
    table = pa.Table.from_pylist([row(0), row(1, prompt="")])
    with pytest.raises(InputError, match=r"^votes\.jsonl, line 23: has an empty prompt"):
        normalise(table, Place("votes.jsonl", "line", [11, 23]))


def test_trl_sides_are_a_fair_coin_and_the_label_follows() -> None:
    n = 4_000
    comparisons = Comparisons.from_rows(trl(n))
    for i, made in enumerate(to_rows(comparisons)):
        preferred, other = ("response_2", "response_1") if made["y"] == 1 else ("response_1", "response_2")
        assert (made[preferred], made[other]) == (f"good {i}", f"bad {i}")
        assert (made["user_id"], made["prompt"]) == (f"u{i % 7}", f"p{i}")
    right = comparisons.y == 1
    assert abs(right.mean() - 0.5) < 4 * 0.5 / np.sqrt(n)
    assert abs(np.mean(right[1:] == right[:-1]) - 0.5) < 4 * 0.5 / np.sqrt(n)


def test_trl_sides_depend_on_the_seed_alone() -> None:
    first, again, other = (Comparisons.from_rows(trl(64), seed=seed).fingerprint() for seed in (3, 3, 4))
    assert first == again != other


def test_the_left_right_form_wins_over_trl() -> None:
    rows = [row(0, chosen="c", rejected="r")]
    assert to_rows(Comparisons.from_rows(rows)) == [row(0)]


@pytest.mark.parametrize("field", ["chosen", "rejected", "user_id"])
def test_trl_values_are_checked(field: str) -> None:
    rows = trl(3)
    rows[1][field] = ""
    with pytest.raises(InputError, match=rf"^rows, row 2: has an empty {field}; expected a non-empty text\.$"):
        Comparisons.from_rows(rows)


@pytest.mark.parametrize("make", [lambda rows: (row for row in rows), tuple])
def test_rows_may_come_from_any_iterable(make: Callable[[list[Row]], Any]) -> None:
    rows = [row(i) for i in range(3)]
    assert to_rows(Comparisons.from_rows(make(rows))) == rows
