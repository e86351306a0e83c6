"""A sweep's folder: what was asked for on what, a run folder per head, and the table of results."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import palcache
from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig, SplitConfig, UnknownUsers
from palcache.errors import CacheError, InputError, MismatchError
from palcache.evaluation import Evaluation
from palcache.files import holds_nothing, read_json, write_bytes, write_json
from palcache.fingerprints import digest
from palcache.runs.folders import RunResult, describe_run, evaluations_to_dict
from palcache.runs.inputs import check_vectors, spaces_for
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.locks import holding
from palcache.sweeps.grids import KEYS, SPLIT_SEED, Grid, Params, configs_of

FORMAT: Final = "palcache-sweep"
VERSION: Final = 1
_LOCK: Final = ".lock"
_LONGEST: Final = 100
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9.+-]+")
_ALWAYS: Final = ("k", "seed")
"""Options that stand in every run's name; of the others those that differ from the default."""


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """A head that a sweep is asked for.

    Attributes:
        name: of its run folder, made of its options.
        path: the run folder.
        params: its options as they were asked for.
        head: its shape.
        fit: how it is trained.
        split_seed: of its split; None takes the table's own.
        split: how the table is split anew for it.
        about: what its run says of it.
        width: of the vectors that it reads.
        error: why it cannot be trained.
    """

    name: str
    path: Path
    params: Params
    head: HeadConfig
    fit: FitConfig
    split_seed: int | None
    split: SplitConfig | None
    about: Mapping[str, Any]
    width: int
    error: str | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class SweepHead:
    """What became of a head of a sweep.

    Attributes:
        name: of its run folder.
        params: its options as they were asked for.
        path: the run folder.
        run: the finished run; None where it failed.
        error: why it failed.
    """

    name: str
    params: Params
    path: Path
    run: RunResult | None
    error: str | None

    @property
    def seconds(self) -> float | None:
        """Wall time of training the head; None where it was not trained in this call."""
        return self.run.seconds if self.run and self.run.fitted else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: `params`, `seconds` (may be null), `val`, `test` and `yardsticks`, or `error`."""
        about = {"name": self.name, "run": str(self.path), "params": self.params}
        if self.run is None:
            return {**about, "error": self.error}
        return {**about, "seconds": self.seconds, **evaluations_to_dict(self.run.evaluations)}

    def options(self, names: Sequence[str]) -> dict[str, Any]:
        """Return some options of the head, those not asked for at their defaults."""
        defaults = {**dataclasses.asdict(HeadConfig()), **dataclasses.asdict(FitConfig())}
        return {name: self.params.get(name, defaults.get(name)) for name in names}

    def figures(self) -> dict[str, float | int | str | None]:
        """Return the numbers of a line of the table; none of a head that failed."""
        if self.run is None:
            return {"error": self.error}
        val, test = (self.run.evaluations[split] for split in ("val", "test"))
        head, micro = test["head"], test["head"].accuracy["micro"]
        return {
            "val_accuracy": _micro(val["head"]),
            "val_log_loss": val["head"].log_loss,
            "test_accuracy": micro.value,
            "test_low": micro.low,
            "test_high": micro.high,
            "test_macro": head.accuracy["macro"].value,
            "test_worst_tenth": head.accuracy["worst_tenth"].value,
            "test_log_loss": head.log_loss,
            "test_brier": head.brier,
            "test_calibration_error": head.calibration_error,
            "user_blind_test_accuracy": _micro(test["user_blind"]),
            "longer_test_accuracy": _micro(test["longer"]),
        }


def _micro(evaluation: Evaluation) -> float:
    return evaluation.accuracy["micro"].value


@final
@dataclass(frozen=True, slots=True, eq=False)
class SweepResult:
    """A sweep's heads.

    Attributes:
        path: the sweep's folder.
        heads: every head asked for so far: earlier ones, then those of the last grid in its order.
    """

    path: Path
    heads: tuple[SweepHead, ...]

    @property
    def varied(self) -> tuple[str, ...]:
        """Options in which the heads differ."""
        names = dict.fromkeys(name for head in self.heads for name in head.params)
        each = [head.options(tuple(names)) for head in self.heads]
        return tuple(name for name in names if len({repr(options[name]) for options in each}) > 1)

    @property
    def failed(self) -> tuple[SweepHead, ...]:
        """Heads that could not be trained."""
        return tuple(head for head in self.heads if head.run is None)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: `heads`, each with `params`, `val`, `test`, `yardsticks` and `seconds`, or `error`."""
        return {"sweep": str(self.path), "heads": [head.to_dict() for head in self.heads]}


@contextlib.contextmanager
def holding_sweep(path: Path) -> Iterator[None]:
    """Hold a sweep's folder alone; no lock is left in a folder that is something else.

    Raises:
        InputError: the folder is something else, or another process trains the sweep.
        CacheError: `sweep.json` is damaged, or of another format or version.
        StorageError: the folder cannot be written, or its file system has no locks.
    """
    _read(path)
    with holding(path / _LOCK) as held:
        if not held:
            raise InputError(
                f"The sweep {path} is being trained by another process; wait for it to end, or name another folder with "
                "--sweep."
            )
        yield


def open_sweep(
    cache: Cache,
    path: Path,
    grid: Grid,
    stored: StoredComparisons,
    *,
    space: str | None,
    unknown_users: UnknownUsers,
) -> list[Trial]:
    """Return all heads of a sweep, earlier ones and then those of the grid in its order, and note them in its folder.

    A head that cannot be trained is not noted: it is reported to whoever asks for it, and not for ever.

    Raises:
        InputError: the folder is something else, or none of the heads can be trained.
        MismatchError: the sweep was made on another table, other vectors or another state of them.
        CacheError: `sweep.json` is damaged, or of another format or version.
    """
    before = _read(path)
    noted, asked = (
        {trial.name: trial for params in heads if (trial := _trial(cache, path, params, stored, space, unknown_users))}
        for heads in (before.get("heads", []), grid.heads())
    )
    trials = {name: trial for name, trial in noted.items() if name not in asked}
    trials |= {name: noted.get(name, trial) for name, trial in asked.items()}
    good = [trial for trial in trials.values() if trial.error is None]
    if not good:
        raise InputError(f"None of {len(trials)} heads can be trained; the first: {next(iter(trials.values())).error}")
    spaces = {
        f"{role} tokens" if trial.fit.token_weighting else role: found
        for trial in good
        for role, found in trial.about["spaces"].items()
    }
    about = {"table": good[0].about["table"], "spaces": spaces, "unknown_users": unknown_users}
    _refuse_another(path, before, about)
    about["spaces"] = {**before.get("spaces", {}), **spaces}
    versions = before.get("versions", {"palcache": palcache.__version__})
    heads = [trial.params for name, trial in trials.items() if trial.error is None or name in noted]
    written = {"format": FORMAT, "version": VERSION, "versions": versions, **about, "heads": heads}
    if written != before:
        write_json(path / "sweep.json", written)
    return list(trials.values())


def _read(path: Path) -> dict[str, Any]:
    """Return what a sweep's folder says; nothing where there is none yet."""
    if not path.exists() or (path.is_dir() and holds_nothing(path, but=(_LOCK,))):
        return {}
    if not (path / "sweep.json").is_file():
        raise InputError(f"{path} exists and is no sweep; name a new folder with --sweep.")
    found = read_json(path / "sweep.json", "a sweep")
    kind = (found.get("format"), found.get("version")) if isinstance(found, dict) else (None, None)
    if kind != (FORMAT, VERSION):
        raise CacheError(
            f"{path / 'sweep.json'} is of format {kind[0]} version {kind[1]}; expected {FORMAT} {VERSION}."
        )
    return dict(found)


def _refuse_another(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to mix heads of different tables, vectors or policies in one sweep."""
    if not before:
        return
    old, new = before["table"], now["table"]
    differing = [f"table.{key} = {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new.get(key)]
    for role, found in now["spaces"].items():
        known = before["spaces"].get(role, found)
        if known != found:
            differing.append(f"space of {role}s {known[:8]}, now {found[:8]}")
    if before["unknown_users"] != now["unknown_users"]:
        differing.append(f"unknown_users = {before['unknown_users']}, now {now['unknown_users']}")
    if differing:
        raise MismatchError(
            f"The sweep {path} was made on something else ({'; '.join(differing)}); name a new folder with --sweep."
        )


def _trial(
    cache: Cache,
    path: Path,
    params: Params,
    stored: StoredComparisons,
    space: str | None,
    unknown_users: UnknownUsers,
) -> Trial:
    """Return a head that is asked for, or why it cannot be trained."""
    params = {name: params[name] for name in KEYS if name in params}  # files and grids have orders of their own
    try:
        head, fit, seed = configs_of(params)
        spaces = spaces_for(cache, stored, space, head, fit)
        check_vectors(cache, spaces, head, fit)
    except InputError as error:
        name = _name(params, digest({"params": params}))
        return Trial(name, path / "runs" / name, params, HeadConfig(), FitConfig(), None, None, {}, 0, str(error))
    split = None if seed is None else _split(stored, seed)
    about = describe_run(cache, stored, spaces, head, fit, unknown_users, split=split)
    values = {**head.to_dict(), **fit.to_dict(), **({SPLIT_SEED: seed} if seed is not None else {})}
    default = {**HeadConfig().to_dict(), **FitConfig().to_dict()}
    named = {key: value for key, value in values.items() if key in _ALWAYS or default.get(key) != value}
    name = _name(
        named, digest({"head": head.to_dict(), "fit": fit.to_dict(), "split": split.to_dict() if split else None})
    )
    width = cache.space(spaces.get("joint", spaces.get("response", ""))).width
    return Trial(name, path / "runs" / name, params, head, fit, seed, split, about, width)


def _split(stored: StoredComparisons, seed: int) -> SplitConfig:
    """Return how a table is split anew by a seed: by the units and shares it was split by, by pair where it had its own."""
    made = dict(stored.about.get("split", {}))
    if made.get("by", "auto") in {"auto", "column"}:
        made["by"] = "pair"
    return SplitConfig.from_mapping({**made, "seed": seed}, origin=f"the table {stored.name}")


def _name(options: Mapping[str, Any], identity: str) -> str:
    """Return a file name that people can read and that the options alone decide."""
    parts = [f"{name}{_UNSAFE.sub('-', str(value)).strip('-')}" for name, value in options.items()]
    return f"{'_'.join(parts)[:_LONGEST].rstrip('_-')}_{identity[:8]}"


def write_results(path: Path, heads: Sequence[SweepHead]) -> SweepResult:
    """Write `results.csv` of a sweep's heads: their options, then figures; return them as its result."""
    result = SweepResult(path, tuple(heads))
    options = [name for name in KEYS if any(name in head.params for head in heads)]
    rows = [{"name": head.name, **head.options(options), **head.figures()} for head in heads]
    figures = [name for row in rows for name in row if name not in {"name", *options}]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["name", *options, *dict.fromkeys(figures)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path / "results.csv", buffer.getvalue().encode())
    return result
