"""`predictions.safetensors`: what a run's rules predict on validation and test, comparison by comparison.

Two runs on one table can be compared pair by pair by it, and pages need no cache. A comparison is named by its row in the
table and the table's fingerprint, which says what stands in that row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from palcache.checkpoints import METADATA, TrainedHead, pack_texts, unpack_texts
from palcache.comparisons import Comparisons
from palcache.errors import CacheError
from palcache.evaluation import Evaluation, evaluate_margins, longer_margins, predict_margins
from palcache.files import write_with
from palcache.fingerprints import canonical_json
from palcache.metrics import Array, Codes, fit_temperature
from palcache.tensors import PreferenceData

FORMAT: Final = "palcache-predictions"
VERSION: Final = 1
PREDICTIONS: Final = "predictions.safetensors"
LONGER: Final = "longer"
"""The rule whose margins are differences in length and no log-odds."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class SplitPredictions:
    """Margins of rules on the n comparisons of a split.

    Attributes:
        rows: each comparison's row in its table, (n,).
        user: number of its user in `Predictions.users`, (n,).
        y: -1, 0 or +1, (n,).
        margins: by rule, r(response_2) - r(response_1), (n,); of `longer`, a difference in characters.
    """

    rows: Codes
    user: Codes
    y: npt.NDArray[np.int8]
    margins: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.y)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What a run predicts.

    Attributes:
        table: fingerprint of the table whose rows are named.
        users: ids: the head's users in its order, then others whom a split has.
        group: number of each user's population group in `groups`, (u,); -1 where it is not known.
        groups: their names.
        splits: by name.
    """

    table: str
    users: tuple[str, ...]
    group: Codes
    groups: tuple[str, ...]
    splits: Mapping[str, SplitPredictions]


def predict_splits(
    rules: Mapping[str, TrainedHead],
    comparisons: Comparisons,
    fingerprint: str,
    parts: Mapping[str, tuple[Codes, PreferenceData]],
) -> Predictions:
    """Return what heads, and the longer response, predict on parts of a table.

    Args:
        rules: heads by name, all of the same users.
        comparisons: the whole table.
        fingerprint: of the table.
        parts: rows and vectors of each split, by name.
    """
    known = next(iter(rules.values())).users
    everyone: list[str] = comparisons.users.values.to_pylist()
    asked = np.unique(np.concatenate([comparisons.users.codes[rows] for rows, _ in parts.values()]))
    strangers = sorted({everyone[code] for code in asked.tolist()} - set(known))
    users = (*known, *strangers)
    at = {user: i for i, user in enumerate(users)}
    number = np.array([at.get(user, -1) for user in everyone], np.int64)
    group, groups = _groups_of(comparisons, number, len(users))
    splits = {}
    for name, (rows, data) in parts.items():
        margins = {rule: predict_margins(head, data) for rule, head in rules.items()}
        margins[LONGER] = longer_margins(comparisons.take(rows))
        splits[name] = SplitPredictions(rows, number[comparisons.users.codes[rows]], comparisons.y[rows], margins)
    return Predictions(fingerprint, users, group, groups, splits)


def evaluate_predictions(predictions: Predictions, split: str, comparisons: Comparisons) -> dict[str, Evaluation]:
    """Return every rule's evaluation on a split, with temperatures fitted on `val` where there are predictions of it.

    Args:
        predictions: of the split, and of `val` for temperatures.
        split: which.
        comparisons: the split's.
    """
    val, out = predictions.splits.get("val"), {}
    for rule, margins in predictions.splits[split].margins.items():
        temperature = fit_temperature(val.margins[rule], val.y) if val and len(val) and rule != LONGER else None
        out[rule] = evaluate_margins(margins, comparisons, probabilities=rule != LONGER, temperature=temperature)
    return out


def _groups_of(comparisons: Comparisons, number: Codes, users: int) -> tuple[Codes, tuple[str, ...]]:
    """Return the group of each user, by the user's first row, and the names of the groups."""
    group = np.full(users, -1, np.int64)
    if comparisons.group is None:
        return group, ()
    codes, first = np.unique(comparisons.users.codes, return_index=True)
    kept = number[codes] >= 0
    group[number[codes[kept]]] = comparisons.group.codes[first[kept]]
    return group, tuple(comparisons.group.values.to_pylist())


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Replace the file at `path` by predictions; the same predictions give the same bytes.

    Margins are kept in float32, in which heads compute them.
    """
    tensors = {}
    for what, texts in (("user", predictions.users), ("group", predictions.groups)):
        tensors[f"{what}.id.bytes"], tensors[f"{what}.id.offsets"] = pack_texts(texts)
    tensors["user.group"] = torch.from_numpy(predictions.group.astype(np.int32))
    for name, split in predictions.splits.items():
        columns: dict[str, npt.NDArray[Any]] = {"rows": split.rows, "user": split.user.astype(np.int32), "y": split.y}
        columns |= {f"margin.{rule}": values.astype(np.float32) for rule, values in split.margins.items()}
        tensors |= {f"{name}.{column}": torch.from_numpy(values.copy()) for column, values in columns.items()}
    splits = {name: list(split.margins) for name, split in predictions.splits.items()}
    described = {"format": FORMAT, "version": VERSION, "table": predictions.table, "splits": splits}
    metadata = {METADATA: canonical_json(described).decode()}
    write_with(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_predictions(path: Path) -> Predictions | None:
    """Read predictions that `save_predictions` wrote; None where there is no such file.

    Raises:
        CacheError: the file is damaged or of another format or version.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        found = (described.get("format"), described.get("version"))
        if found != (FORMAT, VERSION):
            raise CacheError(f"{path} is of format {found[0]} version {found[1]}; expected {FORMAT} {VERSION}.")
        return Predictions(
            described["table"],
            unpack_texts(tensors["user.id.bytes"], tensors["user.id.offsets"]),
            tensors["user.group"].numpy().astype(np.int64),
            unpack_texts(tensors["group.id.bytes"], tensors["group.id.offsets"]),
            {name: _split_of(tensors, name, rules) for name, rules in described["splits"].items()},
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(
            f"{path} cannot be read as a run's predictions ({type(error).__name__}: {error}); train the head again with "
            "palcache train-head."
        ) from error


def _split_of(tensors: Mapping[str, torch.Tensor], name: str, rules: Sequence[str]) -> SplitPredictions:
    margins = {rule: tensors[f"{name}.margin.{rule}"].numpy().astype(np.float64) for rule in rules}
    columns = [tensors[f"{name}.{column}"].numpy() for column in ("rows", "user", "y")]
    if len({len(values) for values in (*columns, *margins.values())}) != 1:
        raise ValueError(f"the columns of the split {name} are not equally long")
    rows, user, y = columns
    return SplitPredictions(rows.astype(np.int64), user.astype(np.int64), y, margins)
