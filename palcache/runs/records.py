"""Runs side by side: which there are, and which options each was trained with."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from palcache.configs import FitConfig, HeadConfig
from palcache.errors import InputError, PalcacheWarning
from palcache.evaluation import Evaluation
from palcache.heads import blind_config
from palcache.runs.folders import read_config, read_evaluations
from palcache.runs.predictions import PREDICTIONS, Predictions, load_predictions

Options = Mapping[str, str | int | float | bool | None]
REPLICATES: Final = ("seed", "split.seed")
"""Options that make another try at the same thing and not another thing."""
OF_TABLES: Final = ("table", "split.by", "split.val", "split.test", "split.seed", "unknown_users")
"""Options that say on which comparisons a rule is evaluated."""
OF_USERS: Final = ("mixture", "temperature", "user_weights", "lr_users")
"""Options of user weights, which a user-blind rule has not."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class RunRecord:
    """A complete run.

    Attributes:
        path: the run folder.
        options: every option of head, training, table and encoder, defaults included.
        table: fingerprint of its table.
        evaluations: by split, then by rule.
    """

    path: Path
    options: Options
    table: str
    evaluations: Mapping[str, Mapping[str, Evaluation]]

    def predictions(self) -> Predictions | None:
        """Read its predictions; None for a run from before they were kept."""
        return load_predictions(self.path / PREDICTIONS)

    def options_of(self, rule: str) -> Options:
        """Return the options that make a difference to a rule: `head`, `user_blind` or `longer`."""
        if rule == "head":
            return self.options
        if rule == "longer":
            return {name: self.options[name] for name in OF_TABLES if name in self.options}
        names = [field.name for field in dataclasses.fields(HeadConfig)]
        blind = blind_config(HeadConfig(**{name: self.options[name] for name in names}))  # type: ignore[arg-type]
        ours = {**self.options, **{name: getattr(blind, name) for name in names}}
        return {name: value for name, value in ours.items() if name not in OF_USERS}


def find_runs(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the run folders that are meant by paths: run folders, sweep folders, and folders of run folders.

    Raises:
        InputError: a path is none of these.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if (path / "config.json").is_file():
            runs = [path]
        else:
            folder = path / "runs" if (path / "runs").is_dir() else path
            runs = sorted(child.parent for child in folder.glob("*/config.json"))
        if not runs:
            raise InputError(
                f"{path} is no run folder and holds none; give a folder that palcache train-head --run or palcache sweep "
                "made, or a folder of run folders."
            )
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    return tuple(found.values())


def read_records(paths: Sequence[Path]) -> tuple[RunRecord, ...]:
    """Return the complete runs that paths stand for, without repeats of the same options and seed.

    Raises:
        InputError: a path stands for no run, or none of the runs is complete.

    Warns:
        PalcacheWarning: a run is left out, because it is not finished, was imported, or repeats another one.
    """
    out: dict[tuple[tuple[str, Any], ...], RunRecord] = {}
    runs = find_runs(paths)
    for record in _with_distinct_names([found for run in runs if (found := _read(run)) is not None]):
        key = tuple(sorted((name, repr(value)) for name, value in record.options.items()))
        if key in out:
            _leave_out(record.path, f"it has the options and the seed of {out[key].path}")
        else:
            out[key] = record
    if not out:
        raise InputError(f"None of the {len(runs)} runs in {', '.join(map(str, paths))} is finished; train them first.")
    return tuple(out.values())


def _read(path: Path) -> tuple[RunRecord, str] | None:
    """Return a run and the space that it reads, or None where it has nothing to show."""
    config = read_config(path)
    if "imported" in config:
        _leave_out(path, "it was imported and not trained")
        return None
    if not (path / "metrics.json").is_file():
        _leave_out(path, "it is not finished")
        return None
    table, spaces = config["table"], config["spaces"]
    split = config.get("split", table.get("split", {}))
    options = {
        **dataclasses.asdict(HeadConfig.from_mapping(config["head"], origin=str(path / "config.json"))),
        **dataclasses.asdict(FitConfig.from_mapping(config["fit"], origin=str(path / "config.json"))),
        "table": table["name"],
        **{f"split.{name}": value for name, value in split.items()},
        "unknown_users": config["unknown_users"],
        "encoder": config["encoder"].get("model"),
    }
    record = RunRecord(path, options, table["fingerprint"], read_evaluations(path))
    return record, spaces.get("joint", spaces.get("response", ""))


def _leave_out(path: Path, why: str) -> None:
    warnings.warn(f"The run {path} is left out: {why}.", PalcacheWarning, stacklevel=4)


def _with_distinct_names(found: Sequence[tuple[RunRecord, str]]) -> list[RunRecord]:
    """Return the runs; names that stand for different tables or encoders get the first digits of what they stand for."""
    splits = [tuple(record.options.get(name) for name in OF_TABLES) for record, _ in found]
    tables = _distinct(splits, [record.table for record, _ in found])
    encoders = _distinct([record.options["encoder"] for record, _ in found], [space for _, space in found])
    return [
        replace(record, options={**record.options, "table": f"{record.options['table']}{table}",
                                 "encoder": f"{record.options['encoder']}{encoder}"})
        for (record, _), table, encoder in zip(found, tables, encoders, strict=True)
    ]  # fmt: skip


def _distinct(names: Sequence[Any], ids: Sequence[str]) -> list[str]:
    """Return what to add to each name so that it stands for one id alone."""
    meant: dict[Any, set[str]] = {}
    for name, of_it in zip(names, ids, strict=True):
        meant.setdefault(name, set()).add(of_it)
    return [f" ({of_it[:8]})" if len(meant[name]) > 1 else "" for name, of_it in zip(names, ids, strict=True)]


def differing(records: Iterable[RunRecord]) -> tuple[str, ...]:
    """Return the options of which runs have different values, seeds left out, in their order."""
    values: dict[str, set[str]] = {}
    records = list(records)
    for name in dict.fromkeys(name for record in records for name in record.options):
        values[name] = {repr(record.options.get(name)) for record in records}
    return tuple(name for name, found in values.items() if len(found) > 1 and name not in REPLICATES)
