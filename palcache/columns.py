"""Columns of comparisons as files have them: which there must be, and what may stand in them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from palcache.errors import InputError, PalcacheWarning

Ties = Literal["refuse", "drop", "half"]
"""What to do with y = 0: refuse the table, drop the row, or keep it with both responses counting one half."""
REQUIRED = ("user_id", "prompt", "response_1", "response_2", "y")
TRL = ("user_id", "prompt", "chosen", "rejected")
OPTIONAL = ("split", "group", "pair_id")
COLUMNS = tuple(dict.fromkeys((*REQUIRED, *TRL, *OPTIONAL)))
"""Every column that palcache reads."""


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Says where in a file a row stands.

    Attributes:
        origin: the file's name.
        unit: what the numbers count: `row` or `line`.
        numbers: the number of each row in its file; by default 1, 2, ...
    """

    origin: str
    unit: str = "row"
    numbers: Sequence[int] | None = None

    def at(self, row: int) -> str:
        """Return the words for a row, counted from 0."""
        return f"{self.origin}, {self.unit} {row + 1 if self.numbers is None else self.numbers[row]}"

    def refuse(self, bad: pa.Array | pa.ChunkedArray, what: str) -> None:
        """Raise InputError for the first row at which `bad` is true."""
        if pc.any(bad).as_py():
            raise InputError(self._sentence(bad, what))

    def warn(self, bad: pa.Array | pa.ChunkedArray, what: str) -> None:
        """Warn of the rows at which `bad` is true."""
        warnings.warn(self._sentence(bad, what), PalcacheWarning, stacklevel=4)

    def _sentence(self, bad: pa.Array | pa.ChunkedArray, what: str) -> str:
        count = pc.sum(bad).as_py()
        more = f" ({count} such {self.unit}s in all)" if count > 1 else ""
        return f"{self.at(pc.index(bad, True).as_py())}: {what}{more}."


def normalise(table: pa.Table, place: Place, *, ties: Ties = "refuse", seed: int = 0) -> pa.Table:
    """Return a table with the columns of `REQUIRED` and those of `OPTIONAL` that it has, all checked.

    Args:
        table: columns as read, in the form `REQUIRED` or TRL's (`TRL`).
        place: names the file and its rows in messages.
        ties: what to do with y = 0.
        seed: draws the side of the chosen response for TRL's form, so that the label cannot be read off the side.

    Raises:
        InputError: a column is missing, a value is empty or not allowed, or the file has neither form.

    Warns:
        PalcacheWarning: rows with two identical responses are left out.
    """
    if ties not in get_args(Ties):
        raise InputError(f"Got the tie policy {ties!r}; expected one of {', '.join(get_args(Ties))}.")
    form = form_of(table.column_names, place.origin)
    columns = {name: _strings(table[name], name, place) for name in form if name != "y"}
    if form is TRL:
        columns, y = _from_trl(columns, seed)
    else:
        y = _answers(table["y"], place)
    columns |= {name: _strings(table[name], name, place) for name in OPTIONAL if name in table.column_names}
    if "split" in columns:
        columns["split"] = _split_names(columns["split"])
    same = pc.equal(columns["response_1"], columns["response_2"])
    tie = pc.and_(pc.invert(same), pa.array(y == 0))
    if pc.any(tie).as_py() and (y > 0).any() and not (y < 0).any():
        binary = "has y = 0, and no y is -1: if these are answers 0 and 1, write -1 and +1"
        if ties == "refuse":
            place.refuse(tie, f"{binary}; if they are ties, choose --ties drop or --ties half")
        place.warn(tie, f"{binary} (taken as ties, as asked)")
    if ties == "refuse":
        place.refuse(tie, "has y = 0, a tie; ties are refused by default: choose --ties drop or --ties half")
    if pc.any(same).as_py():
        place.warn(same, "two identical responses hold no preference, so the row is left out")
    left_out = pc.or_(same, tie) if ties == "drop" else same
    out = pa.table({**columns, "y": pa.array(y)})
    return out.filter(pc.invert(left_out)) if pc.any(left_out).as_py() else out


def form_of(names: Sequence[str], origin: str, *, has: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the form that columns make: `REQUIRED`, else `TRL`.

    Args:
        names: palcache's names of the columns.
        origin: the file's name, for messages.
        has: the file's own names of its columns, for messages; by default `names`.

    Raises:
        InputError: neither form is whole; the message names what lacks and what is there.
    """
    for form in (REQUIRED, TRL):
        if set(form) <= set(names):
            return form
    wanted = TRL if {"chosen", "rejected"} & set(names) else REQUIRED
    missing = [name for name in wanted if name not in names]
    there = ", ".join(sorted(names if has is None else has)) or "none"
    raise InputError(
        f"{origin} lacks the column(s) {', '.join(missing)}; it has {there}: rename columns with --map, for example "
        f"--map {missing[0]}=NAME."
    )


def texts_of(values: Sequence[Any], name: str, place: Place) -> pa.Array:
    """Return Python values as texts, written as typed files have them: 7 and 7.0 are `7`, True is `true`.

    Args:
        values: texts, numbers, truth values and None.
        name: of the column, for messages.
        place: says where a value stands, for messages.

    Raises:
        InputError: a value is a list or an object, or a text that is not Unicode.
    """
    texts = [_text(value) for value in values]
    try:
        return pa.array(texts, pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        for row, text in enumerate(texts):
            try:
                pa.array([text], pa.large_string())
            except UnicodeEncodeError as error:
                raise InputError(f"{place.at(row)}: {name} is not Unicode text ({error}); repair it.") from error
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise InputError(
                    f"{place.at(row)}: {name} is of type {type(text).__name__}; expected plain text: render conversations "
                    "with the model's chat template first."
                ) from error
        raise


def _text(value: Any) -> Any:
    """Return a scalar as text, and anything else as it is."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(value)
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else str(int(value) if value.is_integer() else value)
    return value


_ANSWERS = {"-1": -1, "-1.0": -1, "1": 1, "1.0": 1, "+1": 1, "+1.0": 1, "0": 0, "0.0": 0, "-0": 0, "-0.0": 0}


def _strings(column: pa.ChunkedArray, name: str, place: Place) -> pa.ChunkedArray:
    """Return a column as non-empty strings."""
    place.refuse(pc.is_null(column, nan_is_null=True), f"has no {name}; expected a non-empty text")
    if pa.types.is_nested(column.type):
        raise InputError(
            f"{place.origin}: the column {name} holds {column.type}, expected plain text; render conversations with the "
            "model's chat template first."
        )
    try:
        # By way of bytes: Parquet does not check that its strings are UTF-8, and of the casts only this one does.
        strings = column.cast(pa.large_string()).cast(pa.large_binary()).cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{place.origin}: the column {name} holds {column.type}, expected text ({error}).") from error
    empty = pc.or_(pc.equal(pc.binary_length(strings), 0), pc.utf8_is_space(strings))
    place.refuse(empty, f"has an empty {name}; expected a non-empty text")
    return strings


def _split_names(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return splits by palcache's names: other usual names of the validation split are `val`."""
    other = pc.is_in(column, value_set=pa.array(["validation", "valid", "dev"], pa.large_string()))
    return pc.if_else(other, pa.scalar("val", pa.large_string()), column)


def _answers(column: pa.ChunkedArray, place: Place) -> npt.NDArray[np.int8]:
    """Return y as int8 in {-1, 0, +1}."""
    expected = "expected -1 (response_1 preferred) or +1 (response_2 preferred)"
    place.refuse(pc.is_null(column, nan_is_null=True), f"has no y; {expected}")
    try:
        texts = column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{place.origin}: the column y holds {column.type}; {expected}.") from error
    at = pc.index_in(pc.utf8_trim_whitespace(texts), value_set=pa.array(_ANSWERS, pa.large_string()))
    bad = pc.is_null(at)
    if pc.any(bad).as_py():
        first = texts[pc.index(bad, True).as_py()].as_py()
        place.refuse(bad, f"has y = {first!r}; {expected}")
    answers: npt.NDArray[np.int8] = np.array(list(_ANSWERS.values()), np.int8)[at.to_numpy()]
    return answers


def _from_trl(
    columns: dict[str, pa.ChunkedArray], seed: int
) -> tuple[dict[str, pa.ChunkedArray], npt.NDArray[np.int8]]:
    """Place chosen and rejected left or right by a fair, seeded coin."""
    n = len(columns["prompt"])
    right = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, size=n).astype(bool)
    mask = pa.array(right)
    chosen, rejected = columns.pop("chosen"), columns.pop("rejected")
    columns["response_1"] = pc.if_else(mask, rejected, chosen)
    columns["response_2"] = pc.if_else(mask, chosen, rejected)
    return columns, np.where(right, 1, -1).astype(np.int8)
