"""Files of comparisons -> `Comparisons`: JSON Lines, CSV and Parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from palcache.columns import COLUMNS, Place, Ties, form_of, normalise, texts_of
from palcache.comparisons import Comparisons
from palcache.errors import InputError

_BATCH_ROWS = 65_536
_CSV_BLOCK = 16 << 20
"""Bytes; pyarrow refuses a row that is longer than a block, and its own 1 MiB is not enough for every text."""
_GIVEN = {"user_id": "-", "y": "1"}
"""What stands in the columns of questions that nobody has answered."""


def read_comparisons(
    paths: Sequence[Path],
    *,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "refuse",
    seed: int = 0,
    unlabelled: bool = False,
) -> Comparisons:
    """Read several files as one table.

    Args:
        paths: `.jsonl`/`.ndjson`, `.csv`/`.tsv` or `.parquet` files.
        columns: palcache's name of a column -> the file's name of it.
        ties: what to do with y = 0.
        seed: draws the side of the chosen response in TRL's `prompt, chosen, rejected` form.
        unlabelled: the rows are questions: columns `y` and `user_id` are not read, and stand as +1 and `-`.

    Raises:
        InputError: a file is missing or broken, a column is missing or a value is not allowed.

    Warns:
        PalcacheWarning: rows with two identical responses are left out, once per file.
    """
    if not paths:
        raise InputError("No table was given; name at least one .jsonl, .csv or .parquet file.")
    renames = _check_renames(columns or {})
    tables = [_read_one(path, renames, ties, seed + i, unlabelled=unlabelled) for i, path in enumerate(paths)]
    comparisons = Comparisons.from_tables(tables)
    pa.default_memory_pool().release_unused()  # half a GiB for a million comparisons
    return comparisons


def _check_renames(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the file's name of a column -> palcache's name."""
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise InputError(f"Cannot map to {', '.join(unknown)}; expected names among {', '.join(COLUMNS)}.")
    for source in columns.values():
        names = [name for name, other in columns.items() if other == source]
        if len(names) > 1:
            raise InputError(
                f"The column {source} is mapped to {' and '.join(names)}; expected one name for each column."
            )
    return {source: name for name, source in columns.items()}


def _read_one(path: Path, renames: Mapping[str, str], ties: Ties, seed: int, *, unlabelled: bool = False) -> pa.Table:
    readers = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".pq": _read_parquet,
    }
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"The table {path} {kind}; expected a .jsonl, .csv or .parquet file.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"The table {path} ends in {path.suffix!r}; expected .jsonl, .csv, .tsv or .parquet.")
    given = _GIVEN if unlabelled else {}
    try:
        table, numbers = reader(path, renames, given)
    except (pa.ArrowException, OSError) as error:
        kind = path.suffix[1:].lower()
        raise InputError(f"The table {path} cannot be read as {kind} ({error}); check that it is whole.") from error
    if not len(table):
        raise InputError(f"The table {path} has no rows; give at least one comparison.")
    for name, value in given.items():
        column = pa.array([value] * len(table), pa.large_string())
        at = table.schema.get_field_index(name)
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    place = Place(str(path), "row" if numbers is None else "line", numbers)
    return normalise(table, place, ties=ties, seed=seed)


def _choose(names: Sequence[str], renames: Mapping[str, str], path: Path, given: Iterable[str]) -> dict[str, str]:
    """Return the file's name -> palcache's name of the columns to read; a mapped column wins over one of the same name.

    Those in `given` may be missing.

    Raises:
        InputError: a column is missing or stands twice; the message lists the columns that the file has.
    """
    there = ", ".join(sorted(names)) or "none"
    missing = [source for source in renames if source not in names]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)} to map; it has {there}.")
    targets = set(renames.values())
    chosen = {name: renames.get(name, name) for name in names if name in renames or name in set(COLUMNS) - targets}
    twice = [name for name in chosen if list(names).count(name) > 1]
    if twice:
        raise InputError(f"{path} has several columns named {', '.join(twice)}; keep one of each.")
    form_of([*chosen.values(), *given], str(path), has=names)
    return chosen


def _read_parquet(path: Path, renames: Mapping[str, str], given: Iterable[str]) -> tuple[pa.Table, None]:
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        chosen = _choose(file.schema_arrow.names, renames, path, given)
        table = file.read(columns=list(chosen))
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table[field.name].cast(field.type.value_type))
    return table.select(list(chosen)).rename_columns(list(chosen.values())), None


def _read_csv(path: Path, renames: Mapping[str, str], given: Iterable[str]) -> tuple[pa.Table, None]:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    read = pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK)
    with pyarrow.csv.open_csv(path, read_options=read, parse_options=parse) as file:
        chosen = _choose(file.schema.names, renames, path, given)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=list(chosen),
        column_types=dict.fromkeys(chosen, pa.large_string()),
        strings_can_be_null=False,
    )
    table = pyarrow.csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    return table.rename_columns(list(chosen.values())), None


def _read_jsonl(path: Path, renames: Mapping[str, str], given: Iterable[str]) -> tuple[pa.Table, list[int]]:
    wanted = sorted({*COLUMNS, *renames})
    numbers: list[int] = []
    seen: dict[str, None] = {}
    tables: list[pa.Table] = []
    rows = _json_rows(path)
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        lines = [number for number, _ in batch]
        for _, row in batch:
            seen.update(dict.fromkeys(row))
        columns, place = {}, Place(str(path), "line", lines)
        for name in wanted:
            values = [row.get(name) for _, row in batch]
            columns[name] = texts_of(values, name, place)
        numbers += lines
        tables.append(pa.table(columns))
    if not tables:
        return pa.table({}), numbers
    chosen = _choose(list(seen), renames, path, given)
    return pa.concat_tables(tables).select(list(chosen)).rename_columns(list(chosen.values())), numbers


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}); expected one object a line.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: got {type(row).__name__}; expected one JSON object a line.")
            yield number, row
