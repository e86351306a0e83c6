"""Files of comparisons -> `Comparisons`: JSON Lines, CSV and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from palcache.comparisons import OPTIONAL, REQUIRED, TRL, Comparisons, Ties, normalise
from palcache.errors import InputError

_WANTED = tuple(dict.fromkeys((*REQUIRED, *TRL, *OPTIONAL)))
_BATCH_ROWS = 65_536


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
    """
    if not paths:
        raise InputError("No table was given; name at least one .jsonl, .csv or .parquet file.")
    renames = _check_renames(columns or {})
    tables = [_read_one(path, renames, ties, seed + i, unlabelled=unlabelled) for i, path in enumerate(paths)]
    return Comparisons.from_tables(tables)


def _check_renames(columns: Mapping[str, str]) -> dict[str, str]:
    unknown = [name for name in columns if name not in _WANTED]
    if unknown:
        raise InputError(f"Cannot map to {', '.join(unknown)}; expected names among {', '.join(_WANTED)}.")
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
    table, numbers = reader(path, renames)
    if not len(table):
        raise InputError(f"The table {path} has no rows; give at least one comparison.")
    unit = "line" if numbers is not None else "row"
    if unlabelled:
        for name, value in (("user_id", "-"), ("y", "1")):
            column = pa.array([value] * len(table), pa.large_string())
            at = table.schema.get_field_index(name)
            table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    return normalise(table, origin=str(path), ties=ties, seed=seed, numbers=numbers, unit=unit)


def _rename(table: pa.Table, renames: Mapping[str, str], path: Path) -> pa.Table:
    """Keep the wanted columns under palcache's names; a mapped column wins over one of the same name."""
    missing = [source for source in renames if source not in table.column_names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)} to map; it has {', '.join(sorted(table.column_names))}."
        )
    targets = set(renames.values())
    kept = [name for name in table.column_names if name in renames or (name in _WANTED and name not in targets)]
    if not kept:
        return table
    return table.select(kept).rename_columns([renames.get(name, name) for name in kept])


def _read_parquet(path: Path, renames: Mapping[str, str]) -> tuple[pa.Table, None]:
    try:
        names = pyarrow.parquet.read_schema(path).names
        wanted = [name for name in names if name in _WANTED or name in renames]
        table = pyarrow.parquet.read_table(path, columns=wanted or names, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error}).") from error
    return _rename(_decode(table), renames, path), None


def _decode(table: pa.Table) -> pa.Table:
    """Return the table with dictionary columns as plain ones."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table[field.name].cast(field.type.value_type))
    return table


def _read_csv(path: Path, renames: Mapping[str, str]) -> tuple[pa.Table, None]:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        with pyarrow.csv.open_csv(path, parse_options=parse) as file:
            names = file.schema.names
        convert = pyarrow.csv.ConvertOptions(
            column_types={name: pa.large_string() for name in names}, strings_can_be_null=False
        )
        table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as CSV ({error}).") from error
    return _rename(table, renames, path), None


def _read_jsonl(path: Path, renames: Mapping[str, str]) -> tuple[pa.Table, list[int]]:
    wanted = sorted({*_WANTED, *renames})
    numbers: list[int] = []
    seen: set[str] = set()
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    tables: list[pa.Table] = []
    for number, row in _json_rows(path):
        seen |= row.keys()
        numbers.append(number)
        for name in wanted:
            columns[name].append(row.get(name))
        if len(numbers) % _BATCH_ROWS == 0:
            tables.append(_json_table(columns, path))
            columns = {name: [] for name in wanted}
    tables.append(_json_table(columns, path))
    table = pa.concat_tables(tables, promote_options="permissive")
    known = [name for name in wanted if name in seen]
    unknown = {name: pa.nulls(len(numbers)) for name in sorted(seen)}
    return _rename(table.select(known) if known else pa.table(unknown), renames, path), numbers


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


def _json_table(columns: Mapping[str, list[Any]], path: Path) -> pa.Table:
    """Return columns as Arrow; numbers among texts (user 7 beside user "7b") become texts."""
    arrays = {}
    for name, values in columns.items():
        mixed = any(isinstance(value, str) for value in values)
        try:
            arrays[name] = pa.array([str(v) if mixed and isinstance(v, int | float) else v for v in values])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"{path}: the column {name} mixes types ({error}); expected text.") from error
    return pa.table(arrays)
