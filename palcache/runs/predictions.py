"""`predictions.safetensors`: what a run's rules predict on validation and test, comparison by comparison.

Two runs on one table can be compared pair by pair by it, and pages need no cache. A comparison is named by its row in the
table and the table's fingerprint, which says what stands in that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.checkpoints import TrainedHead
from palcache.comparisons import Comparisons
from palcache.errors import CacheError
from palcache.evaluation import Evaluation, evaluate_margins, longer_margins, predict_margins
from palcache.metrics import Array, Codes, fit_temperature
from palcache.runs.inputs import RunSplit
from palcache.tensor_files import pack_texts, read_tensors, require_format, unpack_texts, write_tensors

FORMAT: Final = "palcache-predictions"
VERSION: Final = 1
PREDICTIONS: Final = "predictions.safetensors"
REMEDY: Final = "train the head again with palcache train-head"
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


def predict_splits(rules: Mapping[str, TrainedHead], splits: Mapping[str, RunSplit], table: str = "") -> Predictions:
    """Return what heads, and the longer response, predict on all splits but the training split.

    Args:
        rules: heads by name, all of the same users.
        splits: the splits; all of them say which groups users belong to.
        table: fingerprint of the table that they are parts of.
    """
    known = next(iter(rules.values())).users
    everyone: set[str] = {user for split in splits.values() for user in split.comparisons.users.values.to_pylist()}
    users = (*known, *sorted(everyone - set(known)))
    number = {user: i for i, user in enumerate(users)}
    group, groups = _groups_of(splits, number)
    out = {}
    for name, split in splits.items():
        if name == "train":
            continue
        part = split.comparisons
        margins = {rule: predict_margins(head, split.served) for rule, head in rules.items()}
        margins[LONGER] = longer_margins(part)
        codes = np.array([number[user] for user in part.users.values.to_pylist()], np.int64)
        out[name] = SplitPredictions(split.rows, codes[part.users.codes], part.y, margins)
    return Predictions(table, users, group, groups, out)


def _groups_of(splits: Mapping[str, RunSplit], number: Mapping[str, int]) -> tuple[Codes, tuple[str, ...]]:
    """Return the group of each user, by the user's first row, and the names of the groups."""
    found: dict[str, str] = {}
    for split in splits.values():
        users, groups = split.comparisons.users, split.comparisons.group
        if groups is not None:
            codes, first = np.unique(users.codes, return_index=True)
            names = [groups.values[int(code)].as_py() for code in groups.codes[first]]
            found = dict(zip((users.values[int(code)].as_py() for code in codes), names, strict=True)) | found
    names = sorted(set(found.values()))
    group = np.full(len(number), -1, np.int64)
    for user, name in found.items():
        group[number[user]] = names.index(name)
    return group, tuple(names)


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


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Replace the file at `path` by predictions; the same predictions give the same bytes.

    Margins are kept in float32, in which heads compute them.
    """
    tensors = {"user.group": torch.from_numpy(predictions.group.astype(np.int32))}
    for what, texts in (("user", predictions.users), ("group", predictions.groups)):
        tensors[f"{what}.id.bytes"], tensors[f"{what}.id.offsets"] = pack_texts(texts)
    for name, split in predictions.splits.items():
        columns: dict[str, npt.NDArray[Any]] = {"rows": split.rows, "user": split.user.astype(np.int32), "y": split.y}
        columns |= {f"margin.{rule}": values.astype(np.float32) for rule, values in split.margins.items()}
        tensors |= {f"{name}.{column}": torch.from_numpy(values.copy()) for column, values in columns.items()}
    rules = {name: list(split.margins) for name, split in predictions.splits.items()}
    about = {"format": FORMAT, "version": VERSION, "table": predictions.table, "splits": rules}
    write_tensors(path, tensors, about)


def load_predictions(path: Path) -> Predictions | None:
    """Read predictions that `save_predictions` wrote; None where there is no such file.

    Raises:
        CacheError: the file is damaged or of another format or version.
    """
    if not path.is_file():
        return None
    about, tensors = read_tensors(path, "a run's predictions", REMEDY)
    require_format(path, about, FORMAT, VERSION)
    try:
        return Predictions(
            about["table"],
            unpack_texts(tensors["user.id.bytes"], tensors["user.id.offsets"]),
            tensors["user.group"].numpy().astype(np.int64),
            unpack_texts(tensors["group.id.bytes"], tensors["group.id.offsets"]),
            {name: _split_of(tensors, name, rules) for name, rules in about["splits"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}.") from error


def _split_of(tensors: Mapping[str, torch.Tensor], name: str, rules: Sequence[str]) -> SplitPredictions:
    margins = {rule: tensors[f"{name}.margin.{rule}"].numpy().astype(np.float64) for rule in rules}
    columns = [tensors[f"{name}.{column}"].numpy() for column in ("rows", "user", "y")]
    if len({len(values) for values in (*columns, *margins.values())}) != 1:
        raise ValueError(f"the columns of the split {name} are not equally long")
    rows, user, y = columns
    return SplitPredictions(rows.astype(np.int64), user.astype(np.int64), y, margins)
