"""Tables of pairwise comparisons: who was asked what, between which two responses, and which they preferred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from palcache.columns import COLUMNS, OPTIONAL, Place, Ties, form_of, normalise, texts_of
from palcache.errors import InputError
from palcache.fingerprints import arrays_digest, text_keys

__all__ = ["OPTIONAL", "SPLITS", "Column", "Comparisons", "IntArray", "Ties"]

IntArray = npt.NDArray[np.int32]
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
        """Build a table from dictionaries with the keys that `palcache.columns` asks for, and any of `OPTIONAL`.

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
