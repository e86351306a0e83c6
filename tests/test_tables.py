"""JSON Lines, CSV and Parquet files of the same rows are the same table; what cannot be read is named."""

from __future__ import annotations

import csv
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import palcache.tables
from palcache.comparisons import Comparisons
from palcache.errors import InputError, PalcacheWarning
from palcache.tables import read_comparisons

Row = dict[str, Any]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda text: not text.isspace()
)
ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")


def rows_of(n: int, **changes: Any) -> list[Row]:
    """Return n valid rows with distinct texts."""
    return [
        {"user_id": f"u{i % 3}", "prompt": f"p{i}", "response_1": f"a{i}", "response_2": f"b{i}", "y": 1 - i % 2 * 2}
        | changes
        for i in range(n)
    ]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows in the form of the path's ending, by other means than the readers'."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=3)
    elif path.suffix in {".csv", ".tsv"}:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",", quoting=csv.QUOTE_NONNUMERIC
            )
            writer.writeheader()
            writer.writerows(rows)
    else:
        escaped = path.suffix != ".ndjson"
        path.write_bytes(b"".join(json.dumps(row, ensure_ascii=escaped).encode() + b"\n" for row in rows))
    return path


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS, st.sampled_from([-1, 1])), min_size=1, max_size=7),
    st.dictionaries(st.sampled_from(["split", "group", "pair_id"]), TEXTS),
)
def test_every_form_of_file_gives_the_same_table(values: list[tuple[str, str, str, str, int]], more: Row) -> None:
    """Quotes, separators, line ends, NULs and spaces inside texts survive in each of them."""
    names = ("user_id", "prompt", "response_1", "response_2", "y")
    rows = [dict(zip(names, (u, p, a, a + b, y), strict=True)) | more for u, p, a, b, y in values]
    expected = Comparisons.from_rows(rows)
    with tempfile.TemporaryDirectory() as folder:
        for ending in (*ENDINGS, ".ndjson"):
            made = read_comparisons([write(Path(folder, "table" + ending), rows)])
            assert made.fingerprint() == expected.fingerprint(), ending
            assert made.responses.to_pylist() == expected.responses.to_pylist()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "text", ["x" * 3_000_000, 'a "quoted", text;\r\n\n\ttab', "🦔🏽‍🚀 e\u0301", " spaces ", "NA", "null"]
)
def test_unusual_texts_survive(tmp_path: Path, ending: str, text: str) -> None:
    rows = rows_of(2)
    rows[1]["response_2"] = text
    made = read_comparisons([write(tmp_path / f"table{ending}", rows)])
    assert made.responses.to_pylist()[-1] == text


@pytest.mark.parametrize("ending", ENDINGS)
def test_numbers_name_users_alike(tmp_path: Path, ending: str) -> None:
    rows = rows_of(3)
    for i, row in enumerate(rows):
        row["user_id"] = i + 7
    assert read_comparisons([write(tmp_path / f"table{ending}", rows)]).users.to_list() == ["7", "8", "9"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_columns_are_mapped_and_others_ignored(tmp_path: Path, ending: str) -> None:
    """A mapped column wins over one that has the name already; a dot is no path into a nested column."""
    rows = [{"worker.id": f"w{i}", "user_id": "wrong", "extra": "", **row} for i, row in enumerate(rows_of(3))]
    for row in rows:
        row["user_id"] = "wrong"
    made = read_comparisons([write(tmp_path / f"table{ending}", rows)], columns={"user_id": "worker.id"})
    assert made.users.to_list() == ["w0", "w1", "w2"]


def test_columns_may_be_swapped(tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", rows_of(2))
    made = read_comparisons([path], columns={"response_1": "response_2", "response_2": "response_1"})
    assert made.responses.to_pylist() == ["b0", "b1", "a0", "a1"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_trl_files_are_read(tmp_path: Path, ending: str) -> None:
    rows = [{"who": f"u{i}", "prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    path = write(tmp_path / f"table{ending}", rows)
    made = read_comparisons([path], columns={"user_id": "who"}, seed=3)
    expected = Comparisons.from_rows([{"user_id": row.pop("who"), **row} for row in rows], seed=3)
    assert made.fingerprint() == expected.fingerprint()
    assert read_comparisons([path], columns={"user_id": "who"}, seed=4).fingerprint() != expected.fingerprint()


def test_two_trl_files_do_not_repeat_one_anothers_coins(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(64)]
    path = write(tmp_path / "table.jsonl", rows)
    y = read_comparisons([path, path]).y
    assert y[:64].tolist() != y[64:].tolist()


def test_several_files_become_one_table(tmp_path: Path) -> None:
    rows = rows_of(9)
    paths = [
        write(tmp_path / f"part{ending}", rows[i : i + 3])
        for i, ending in ((0, ".csv"), (3, ".jsonl"), (6, ".parquet"))
    ]
    assert read_comparisons(paths).fingerprint() == Comparisons.from_rows(rows).fingerprint()


def test_an_optional_column_in_some_files_only_is_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / "one.csv", rows_of(2)), write(tmp_path / "two.csv", rows_of(2, split="train"))]
    with pytest.raises(
        InputError, match=r"^The column split stands in 1 of 2 files; give it to all of them or none\.$"
    ):
        read_comparisons(paths)


def test_identical_responses_are_one_warning_per_file(tmp_path: Path) -> None:
    rows = rows_of(4)
    rows[1]["response_2"] = rows[1]["response_1"]
    rows[2]["response_2"] = rows[2]["response_1"]
    path = write(tmp_path / "table.jsonl", rows)
    with pytest.warns(
        PalcacheWarning, match=r"table\.jsonl, line 2: two identical responses .* \(2 such lines in all\)"
    ) as caught:
        assert len(read_comparisons([path])) == 2
    assert len(caught) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_ties_follow_the_policy(tmp_path: Path, ending: str) -> None:
    rows = rows_of(3)
    rows[0]["y"], rows[1]["y"] = -1, 0
    path = write(tmp_path / f"table{ending}", rows)
    unit = "line" if ending == ".jsonl" else "row"
    with pytest.raises(
        InputError, match=rf"table\{ending}, {unit} 2: has y = 0, a tie; .* --ties drop or --ties half\.$"
    ):
        read_comparisons([path])
    assert read_comparisons([path], ties="drop").y.tolist() == [-1, 1]
    assert read_comparisons([path], ties="half").y.tolist() == [-1, 0, 1]


@pytest.mark.parametrize("ending", ENDINGS)
def test_other_names_of_the_validation_split_are_read(tmp_path: Path, ending: str) -> None:
    rows = [
        {**row, "split": name} for row, name in zip(rows_of(4), ("train", "validation", "dev", "test"), strict=True)
    ]
    found = read_comparisons([write(tmp_path / f"table{ending}", rows)]).split
    assert found is not None
    assert [found.values.to_pylist()[code] for code in found.codes] == ["train", "val", "val", "test"]


def test_answers_of_0_and_1_are_not_taken_for_ties(tmp_path: Path) -> None:
    """Where they are asked to be, it is said."""
    rows = rows_of(4)
    for row, y in zip(rows, (1, 0, 1, 0), strict=True):
        row["y"] = y
    path = write(tmp_path / "table.csv", rows)
    with pytest.raises(
        InputError, match=r"row 2: has y = 0, and no y is -1: if these are answers 0 and 1, write -1 and"
    ):
        read_comparisons([path])
    with pytest.warns(
        PalcacheWarning, match=r"if these are answers 0 and 1, write -1 and \+1 \(taken as ties, as asked\)"
    ):
        assert read_comparisons([path], ties="half").y.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("user_id", "", "has an empty user_id; expected a non-empty text."),
        ("prompt", " ", "has an empty prompt; expected a non-empty text."),
        ("response_1", "\t", "has an empty response_1; expected a non-empty text."),
        ("response_2", "", "has an empty response_2; expected a non-empty text."),
        ("y", 2, "has y = '2'; expected -1 (response_1 preferred) or +1 (response_2 preferred)."),
        ("split", "", "has an empty split; expected a non-empty text."),
    ],
)
def test_a_bad_value_is_named_with_file_and_row(
    tmp_path: Path, ending: str, field: str, value: Any, message: str
) -> None:
    rows = rows_of(4, split="train")
    rows[2][field] = value
    path = write(tmp_path / f"table{ending}", rows)
    unit = "line" if ending == ".jsonl" else "row"
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}, {unit} 3: {re.escape(message)}$"):
        read_comparisons([path])


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("field", ["user_id", "prompt", "response_1", "response_2", "y"])
def test_a_null_is_named_with_file_and_row(tmp_path: Path, ending: str, field: str) -> None:
    rows = rows_of(4)
    rows[1][field] = None
    unit = "line" if ending == ".jsonl" else "row"
    with pytest.raises(InputError, match=rf"table\{ending}, {unit} 2: has no {field}; expected"):
        read_comparisons([write(tmp_path / f"table{ending}", rows)])


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("value", [["a"], [{"role": "user", "content": "hi"}], {"text": "hi"}], ids=repr)
def test_nested_columns_are_refused(tmp_path: Path, ending: str, value: Any) -> None:
    rows = rows_of(3, prompt=value)
    with pytest.raises(InputError, match=rf"table\{ending}.* prompt .*expected plain text.* render conversations with"):
        read_comparisons([write(tmp_path / f"table{ending}", rows)])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_column_is_named_with_those_of_the_file(tmp_path: Path, ending: str) -> None:
    rows = [{"worker": row.pop("user_id"), **row} for row in rows_of(3)]
    expected = (
        rf"table\{ending} lacks the column\(s\) user_id; it has prompt, response_1, response_2, worker, y: rename columns "
        "with --map, for example --map user_id=NAME"
    )
    with pytest.raises(InputError, match=expected):
        read_comparisons([write(tmp_path / f"table{ending}", rows)])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_of_other_columns_is_refused(tmp_path: Path, ending: str) -> None:
    expected = r"lacks the column\(s\) user_id, prompt, response_1, response_2, y; it has question, rating:"
    with pytest.raises(InputError, match=expected):
        read_comparisons([write(tmp_path / f"table{ending}", [{"question": "why?", "rating": 5}])])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_mapped_column_that_is_missing_is_refused(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"table{ending}", rows_of(2))
    expected = rf"table\{ending} has no column worker to map; it has prompt, response_1, response_2, user_id, y\.$"
    with pytest.raises(InputError, match=expected):
        read_comparisons([path], columns={"user_id": "worker"})


def test_maps_are_checked_before_any_file(tmp_path: Path) -> None:
    missing = tmp_path / "none.csv"
    with pytest.raises(
        InputError, match=r"^Cannot map to user, reply; expected names among user_id, prompt, .*, pair_id\.$"
    ):
        read_comparisons([missing], columns={"user": "worker", "prompt": "question", "reply": "r"})
    with pytest.raises(
        InputError, match=r"^The column text is mapped to prompt and response_1; expected one name for each"
    ):
        read_comparisons([missing], columns={"prompt": "text", "response_1": "text"})


def test_missing_files_folders_and_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^No table was given; name at least one \.jsonl, \.csv or \.parquet file\.$"):
        read_comparisons([])
    with pytest.raises(
        InputError, match=r"^The table .*/none\.csv does not exist; expected a \.jsonl, \.csv or \.parquet"
    ):
        read_comparisons([tmp_path / "none.csv"])
    with pytest.raises(InputError, match=r"^The table .* is a folder; expected a \.jsonl, \.csv or \.parquet file\.$"):
        read_comparisons([tmp_path])
    for name in ("table.xlsx", "table.csv.gz", "table"):
        (tmp_path / name).write_text("content")
        ending = re.escape(Path(name).suffix)
        with pytest.raises(
            InputError, match=rf"{name} ends in '{ending}'; expected \.jsonl, \.csv, \.tsv or \.parquet\.$"
        ):
            read_comparisons([tmp_path / name])


@pytest.mark.parametrize("ending", [".JSONL", ".ndjson", ".json", ".CSV", ".Parquet", ".pq"])
def test_other_spellings_of_the_endings(tmp_path: Path, ending: str) -> None:
    kinds = {".jsonl": ".jsonl", ".ndjson": ".jsonl", ".json": ".jsonl", ".csv": ".csv"}
    made = write(tmp_path / ("made" + kinds.get(ending.lower(), ".parquet")), rows_of(3))
    assert len(read_comparisons([made.rename(tmp_path / f"table{ending}")])) == 3


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".jsonl", ""),
        (".jsonl", "\n  \n\n"),
        (".csv", "user_id,prompt,response_1,response_2,y\n"),
    ],
)
def test_files_without_rows_are_refused(tmp_path: Path, ending: str, content: str) -> None:
    (tmp_path / f"table{ending}").write_text(content)
    for columns in ({}, {"user_id": "user_id"}):
        with pytest.raises(InputError, match=rf"table\{ending} has no rows; give at least one comparison\.$"):
            read_comparisons([tmp_path / f"table{ending}"], columns=columns)


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows_of(1))
    pq.write_table(table[:0], tmp_path / "table.parquet")
    with pytest.raises(InputError, match=r"table\.parquet has no rows; give at least one comparison\.$"):
        read_comparisons([tmp_path / "table.parquet"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"user_id": "u", ', r"not JSON \(.+\); expected one object a line\.$"),
        (b"{'user_id': 'u'}", r"not JSON \(.+\); expected one object a line\.$"),
        (b'{"user_id": "\xff"}', r"not JSON \('utf-8' codec .+\); expected one object a line\.$"),
        (b"[1, 2]", r"got list; expected one JSON object a line\.$"),
        (b"null", r"got NoneType; expected one JSON object a line\.$"),
    ],
)
def test_broken_json_is_named_with_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    good = json.dumps(rows_of(1)[0]).encode()
    path = tmp_path / "table.jsonl"
    path.write_bytes(b"\n".join([good, b"", good, line, good]))
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}, line 4: {message}"):
        read_comparisons([path])


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    good, bad = (json.dumps(row) for row in (rows_of(1)[0], rows_of(1, prompt="")[0]))
    (tmp_path / "table.jsonl").write_text(f"\n{good}\n \n\n{bad}\n{good}")
    with pytest.raises(InputError, match=r"table\.jsonl, line 5: has an empty prompt"):
        read_comparisons([tmp_path / "table.jsonl"])


@pytest.mark.parametrize(("ending", "start"), [(".csv", b"\xef\xbb\xbf"), (".jsonl", b"\xef\xbb\xbf")])
def test_a_byte_order_mark_is_no_part_of_the_table(tmp_path: Path, ending: str, start: bytes) -> None:
    path = write(tmp_path / f"table{ending}", rows_of(3))
    path.write_bytes(start + path.read_bytes())
    assert read_comparisons([path]).fingerprint() == Comparisons.from_rows(rows_of(3)).fingerprint()


def test_long_json_files_may_mix_numbers_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of lines must agree on the type of a column whatever stands in them."""
    monkeypatch.setattr(palcache.tables, "_BATCH_ROWS", 2)
    users: list[Any] = [7, 8, "7b", "x", 2**70, 7.0, True]
    rows = rows_of(7)
    for row, user in zip(rows, users, strict=True):
        row["user_id"] = user
    made = read_comparisons([write(tmp_path / "table.jsonl", rows)])
    assert made.users.to_list() == ["7", "8", "7b", "x", str(2**70), "7", "true"]
    rows[5]["prompt"] = ["nested"]
    with pytest.raises(InputError, match=r"table\.jsonl, line 6: prompt is of type list; expected plain text"):
        read_comparisons([write(tmp_path / "table.jsonl", rows)])


def test_an_optional_key_in_late_lines_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palcache.tables, "_BATCH_ROWS", 2)
    rows = [*rows_of(5), *rows_of(1, group="g")]
    with pytest.raises(InputError, match=r"table\.jsonl, line 1: has no group; .* \(5 such lines in all\)\.$"):
        read_comparisons([write(tmp_path / "table.jsonl", rows)])


def test_json_with_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "table.jsonl", rows_of(3, prompt="half \ud83e"))
    with pytest.raises(InputError, match=r"table\.jsonl, line 1: prompt is not Unicode text"):
        read_comparisons([path])


@pytest.mark.parametrize(
    ("ending", "content", "reason"),
    [
        (".csv", b"", "Empty CSV file"),
        (".csv", b"user_id,prompt,response_1,response_2,y\nu,p,a,b,1\nu,p,a\n", "Expected 5 columns, got 3"),
        (".csv", b"user_id,prompt,response_1,response_2,y\nu,\xff,a,b,1\n", "invalid UTF8"),
        (".parquet", b"", "Parquet"),
        (".parquet", b"user_id,prompt\n", "Parquet"),
        (".parquet", b"PAR1" + bytes(99) + b"PAR1", ""),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, ending: str, content: bytes, reason: str) -> None:
    path = tmp_path / f"table{ending}"
    path.write_bytes(content)
    expected = (
        rf"^The table {re.escape(str(path))} cannot be read as {ending[1:]} \((.|\n)*{reason}(.|\n)*\); check that it"
    )
    with pytest.raises(InputError, match=expected):
        read_comparisons([path])


def test_a_parquet_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "table.parquet", rows_of(30))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"table\.parquet cannot be read as parquet \("):
        read_comparisons([path])


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Simulated, because root may read everything."""

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / f"table{ending}", rows_of(1))
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("pyarrow.csv.open_csv", refuse)
    with pytest.raises(InputError, match=rf"table\{ending} cannot be read as {ending[1:]} \(.*Permission denied\)"):
        read_comparisons([path])


def test_columns_that_stand_twice_are_refused(tmp_path: Path) -> None:
    header = "user_id,prompt,prompt,response_1,response_2,y\n"
    (tmp_path / "table.csv").write_text(header + "u,p,q,a,b,1\n")
    with pytest.raises(InputError, match=r"table\.csv has several columns named prompt; keep one of each\.$"):
        read_comparisons([tmp_path / "table.csv"])
    arrays = [pa.array(["x"])] * 6
    pq.write_table(pa.Table.from_arrays(arrays, header.strip().split(",")), tmp_path / "table.parquet")
    with pytest.raises(InputError, match=r"table\.parquet has several columns named prompt; keep one of each\.$"):
        read_comparisons([tmp_path / "table.parquet"])


def test_parquet_columns_may_be_categories_and_other_types(tmp_path: Path) -> None:
    rows = rows_of(7, split="train")
    table = pa.Table.from_pylist(rows)
    for name in ("user_id", "split", "prompt"):
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    table = table.set_column(4, "y", table["y"].cast(pa.float64()))
    pq.write_table(table, tmp_path / "table.parquet", row_group_size=2)
    assert read_comparisons([tmp_path / "table.parquet"]).fingerprint() == Comparisons.from_rows(rows).fingerprint()


def test_folders_named_like_columns_do_not_add_them(tmp_path: Path) -> None:
    """`split=test/` is a partition to some readers of Parquet."""
    (tmp_path / "split=test").mkdir()
    path = write(tmp_path / "split=test/table.parquet", rows_of(2))
    assert read_comparisons([path]).split is None


def test_csv_texts_may_span_lines_wherever_a_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(60)
    for i, row in enumerate(rows):
        row["prompt"] = "line\n" * (i % 7) + "end"
    path = write(tmp_path / "table.csv", rows)
    monkeypatch.setattr(palcache.tables, "_CSV_BLOCK", 211)
    assert read_comparisons([path]).fingerprint() == Comparisons.from_rows(rows).fingerprint()


def test_csv_texts_are_never_guessed(tmp_path: Path) -> None:
    """No column turns into numbers, dates or nulls."""
    rows = rows_of(4)
    for row, user in zip(rows, ("007", "1e5", "2024-01-01", "NaN"), strict=True):
        row |= {"user_id": user, "prompt": user}
    made = read_comparisons([write(tmp_path / "table.csv", rows)])
    assert made.users.to_list() == made.prompts.to_list() == ["007", "1e5", "2024-01-01", "NaN"]


@pytest.mark.parametrize("make", [lambda rows: rows, lambda rows: [*rows, *rows]])
def test_reading_warns_of_nothing_else(tmp_path: Path, make: Callable[[list[Row]], list[Row]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = read_comparisons([write(tmp_path / f"table{ending}", make(rows_of(5))) for ending in ENDINGS])
    assert np.unique(made.y, return_counts=True)[0].tolist() == [-1, 1]
