"""Tables of pairwise comparisons: who was asked what, between which two responses, and which they preferred."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from palcache.errors import InputError, PalcacheWarning
from palcache.fingerprints import arrays_digest, text_keys

Ties = Literal["refuse", "drop", "half"]
"""What to do with y = 0: refuse the table, drop the row, or keep it with both responses counting one half."""

IntArray = npt.NDArray[np.int32]
REQUIRED = ("user_id", "prompt", "response_1", "response_2", "y")
TRL = ("user_id", "prompt", "chosen", "rejected")
OPTIONAL = ("split", "group", "pair_id")
COLUMNS = tuple(dict.fromkeys((*REQUIRED, *TRL, *OPTIONAL)))
"""Every column that palcache reads."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A column of strings that stores each distinct one once.

    Attributes:
        values: the distinct strings, a `large_string` array of length m.
        codes: the row's index into `values`, shape (n,).
    """

    values: pa.Array
    codes: IntArray

    @classmethod
    def encode(cls, strings: pa.ChunkedArray | pa.Array) -> Column:
        """Dictionary-encode strings; values stand in order of first appearance."""
        whole = pa.chunked_array([strings]) if isinstance(strings, pa.Array) else strings
        encoded = whole.cast(pa.large_string()).dictionary_encode()
        chunks = encoded.chunks
        if any(not chunk.dictionary.equals(chunks[0].dictionary) for chunk in chunks[1:]):
            chunks = encoded.unify_dictionaries().chunks  # Arrow shares one already, and unifying copies all texts
        if not chunks:
            return cls(pa.array([], pa.large_string()), np.empty(0, np.int32))
        codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks])
        return cls(chunks[-1].dictionary, codes.astype(np.int32, copy=False))

    @classmethod
    def of(cls, strings: Iterable[str]) -> Column:
        """Dictionary-encode Python strings."""
        return cls.encode(pa.array(list(strings), pa.large_string()))

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: npt.NDArray[Any]) -> Column:
        """Return the column at some rows, with only the values they use."""
        used, codes = np.unique(self.codes[rows], return_inverse=True)
        return Column(self.values.take(pa.array(used)), codes.astype(np.int32))

    def to_list(self) -> list[str]:
        """Return one Python string per row."""
        values: list[str] = self.values.to_pylist()
        return [values[code] for code in self.codes.tolist()]


@dataclass(frozen=True, slots=True, eq=False)
class Comparisons:
    """A validated table of n comparisons; every text and name is stored once.

    Attributes:
        users: who judged, one string per row.
        prompts: what was asked, one text per row.
        responses: the distinct response texts, a `large_string` array.
        response_1: index of the left response in `responses`, shape (n,).
        response_2: index of the right response, shape (n,).
        y: -1 the user prefers response_1, +1 response_2, 0 a tie that counts one half; shape (n,).
        split: `train`, `val`, `test` (or `support`, `query`) per row, where known.
        group: the population group of the row's user, where known.
        pair_id: the table's own name of the pair, where known.
    """

    users: Column
    prompts: Column
    responses: pa.Array
    response_1: IntArray
    response_2: IntArray
    y: npt.NDArray[np.int8]
    split: Column | None = None
    group: Column | None = None
    pair_id: Column | None = None

    def __len__(self) -> int:
        return len(self.y)

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], *, origin: str = "rows", ties: Ties = "refuse", seed: int = 0
    ) -> Comparisons:
        """Build a table from dictionaries with the keys of `REQUIRED` or `TRL`, and any of `OPTIONAL`.

        Raises:
            InputError: a key is missing or a value is not allowed; the message names `origin` and the row.

        Warns:
            PalcacheWarning: rows with two identical responses are left out.
        """
        kept, place = list(rows), Place(origin)
        if not kept:
            raise InputError(f"{origin} are empty; give at least one comparison.")
        names = dict.fromkeys(name for row in kept for name in row)
        columns = {name: texts_of([row.get(name) for row in kept], name, place) for name in names if name in COLUMNS}
        form_of(list(columns), origin, has=list(map(str, names)))
        return cls.from_tables([normalise(pa.table(columns), place, ties=ties, seed=seed)])

    @classmethod
    def from_tables(cls, tables: Sequence[pa.Table]) -> Comparisons:
        """Join tables that `normalise` has made; a column of `OPTIONAL` must stand in all of them or in none.

        Raises:
            InputError: an optional column stands in some tables only, or no row is left.
        """
        for name in OPTIONAL:
            with_it = [name in table.column_names for table in tables]
            if any(with_it) and not all(with_it):
                raise InputError(
                    f"The column {name} stands in {sum(with_it)} of {len(tables)} files; give it to all of them or none."
                )
        table = pa.concat_tables(tables)
        if not len(table):
            raise InputError(
                "No comparison is left once ties and pairs of identical responses are out; give at least one row with a "
                "preference."
            )
        responses = Column.encode(
            pa.chunked_array([*table["response_1"].chunks, *table["response_2"].chunks], pa.large_string())
        )
        n = len(table)
        optional = {name: Column.encode(table[name]) for name in OPTIONAL if name in table.column_names}
        return cls(
            users=Column.encode(table["user_id"]),
            prompts=Column.encode(table["prompt"]),
            responses=responses.values,
            response_1=responses.codes[:n],
            response_2=responses.codes[n:],
            y=table["y"].to_numpy().astype(np.int8),
            **optional,
        )

    def optional(self) -> dict[str, Column]:
        """Return those of the columns `OPTIONAL` that the table has, by name."""
        columns: dict[str, Column | None] = {"split": self.split, "group": self.group, "pair_id": self.pair_id}
        return {name: column for name, column in columns.items() if column is not None}

    def take(self, rows: npt.NDArray[Any]) -> Comparisons:
        """Return the comparisons at some rows (indices or a mask), with only the texts and names they use."""
        codes = np.stack([self.response_1[rows], self.response_2[rows]])
        used, inverse = np.unique(codes, return_inverse=True)
        inverse = inverse.reshape(codes.shape).astype(np.int32)
        return Comparisons(
            users=self.users.take(rows),
            prompts=self.prompts.take(rows),
            responses=self.responses.take(pa.array(used)),
            response_1=inverse[0],
            response_2=inverse[1],
            y=self.y[rows],
            **{name: column.take(rows) for name, column in self.optional().items()},
        )

    def joint_items(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the distinct pairs of a prompt and a response, and each comparison's two items among them.

        Returns:
            Rows of prompt and response, (m, 2), in order of first appearance, and rows of these, (n, 2).
        """
        width = max(1, len(self.responses))
        sides = np.stack([self.response_1, self.response_2], axis=1).astype(np.int64)
        codes = self.prompts.codes.astype(np.int64)[:, None] * width + sides
        distinct, first, item = np.unique(codes.reshape(-1), return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        ordered = distinct[order]
        return np.stack([ordered // width, ordered % width], axis=1), rank[item.reshape(-1)].reshape(-1, 2)

    def with_split(self, split: Column) -> Comparisons:
        """Return the same comparisons with another split."""
        return replace(self, split=split)

    def fingerprint(self) -> str:
        """Return a digest of the table's meaning: users, texts, answers and splits, in row order."""
        prompt_keys, response_keys = text_keys(self.prompts.values), text_keys(self.responses)
        arrays: dict[str, npt.NDArray[Any]] = {
            "user": text_keys(self.users.values)[self.users.codes],
            "prompt": prompt_keys[self.prompts.codes],
            "response_1": response_keys[self.response_1],
            "response_2": response_keys[self.response_2],
            "y": self.y,
        }
        for name, column in self.optional().items():
            arrays[name] = text_keys(column.values)[column.codes]
        return arrays_digest(arrays)


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
    same = pc.equal(columns["response_1"], columns["response_2"])
    tie = pc.and_(pc.invert(same), pa.array(y == 0))
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
