"""A run folder: one trained head with its configuration, fingerprints, history, metrics and picture.

```
RUN/
  config.json           what was trained on what: configurations, fingerprints of cache and table, versions
  head.safetensors      the head of the lowest validation loss, its users included
  users.safetensors     its users: what is known of each, comparisons of each, and the prior of new ones (k > 1)
  adapted_users.safetensors  users who were added later
  user_blind.safetensors  the k = 1 yardstick, trained with the same settings
  history.csv           every evaluation
  metrics.json          test and validation, yardsticks beside them; no wall times: the same seed gives the same bytes
  predictions.safetensors  what head and yardsticks predict on validation and test, comparison by comparison
  prototypes.json       what sets the prototypes apart (heads that have them)
  curves.png
  logs/                 events for TensorBoard or Weights & Biases, where they were asked for; no part of the run
  state.safetensors     where to go on; only while training is unfinished
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

import palcache
from palcache.cache import Cache
from palcache.checkpoints import TrainedHead, load_head, save_head
from palcache.configs import FitConfig, HeadConfig, SplitConfig, UnknownUsers
from palcache.errors import CacheError, InputError, MismatchError
from palcache.evaluation import Evaluation, token_accuracy
from palcache.files import holds_nothing, read_json, remove_leftovers, write_json
from palcache.heads import head_to_dict
from palcache.reports import draw_history, write_history
from palcache.runs.inputs import EVALUATED, RunSplit
from palcache.runs.predictions import PREDICTIONS, Predictions, evaluate_predictions, predict_splits, save_predictions
from palcache.runs.prototypes import PROTOTYPES, describe_prototypes, has_prototypes, save_prototypes
from palcache.storage.comparison_files import StoredComparisons
from palcache.token_batches import TokenData
from palcache.training import FitResult
from palcache.users.adaptation import describe_population
from palcache.users.reductions import is_reducible
from palcache.users.user_files import SEEN, UserTable, save_users

FORMAT: Final = "palcache-run"
VERSION: Final = 1
LOGS: Final = "logs"
"""Where logs of the training go; a folder with nothing else is as good as none."""
RULES: Final = ("head", "user_blind", "longer")


@final
@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """A finished run.

    Attributes:
        path: the run folder.
        head: the trained head.
        evaluations: by split, then by rule: `head`, `user_blind`, `longer`.
        seconds: wall time of training the head in this call, loading and yardsticks left out.
        fitted: how training went; None where the run was complete before.
    """

    path: Path
    head: TrainedHead
    evaluations: Mapping[str, Mapping[str, Evaluation]]
    seconds: float
    fitted: FitResult | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: `test.accuracy.micro`, `val...`, `yardsticks.<rule>.test...`, `seconds`."""
        return {"run": str(self.path), "seconds": self.seconds, **evaluations_to_dict(self.evaluations)}


def evaluations_to_dict(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, Any]:
    """Return evaluations as JSON values: the head's by split, the yardsticks' by rule and split."""
    rules = {rule: None for by_rule in evaluations.values() for rule in by_rule if rule != "head"}
    return {
        **{split: by_rule["head"].to_dict() for split, by_rule in evaluations.items()},
        "yardsticks": {
            rule: {split: by_rule[rule].to_dict() for split, by_rule in evaluations.items() if rule in by_rule}
            for rule in rules
        },
    }


def describe_run(
    cache: Cache,
    stored: StoredComparisons,
    spaces: Mapping[str, str],
    head: HeadConfig,
    config: FitConfig,
    unknown_users: UnknownUsers,
    *,
    split: SplitConfig | None = None,
) -> dict[str, Any]:
    """Return what a run must agree on to be continued, and a cache to be evaluated.

    `split` is how the table was split anew for this run; None is the table's own split, of which nothing is said.
    """
    return {
        **({"split": split.to_dict()} if split else {}),
        "table": {**stored.about, "name": stored.name, "fingerprint": stored.fingerprint},
        "spaces": dict(spaces),
        "encoder": dict(cache.about(spaces.get("joint", spaces.get("prompt", "")))),
        "head": head.to_dict(),
        "fit": config.to_dict(),
        "unknown_users": unknown_users,
    }


def is_complete(path: Path, about: dict[str, Any], *, resume: bool) -> bool:
    """Refuse a folder that is taken or cannot be continued; return whether its run is complete already."""
    if not path.exists() or (path.is_dir() and holds_nothing(path, but=(LOGS,))):
        return False
    if not (path / "config.json").is_file():
        raise InputError(f"{path} exists and is no run folder; name a new one with --run.")
    if not resume:
        raise InputError(f"The run {path} exists; name a new folder with --run, or continue it with --resume.")
    differing = list(_differences(read_config(path), about))
    if differing:
        raise MismatchError(
            f"The run {path} cannot be continued: it has {'; '.join(differing)}. Give the same options, or a new --run."
        )
    return (path / "metrics.json").is_file()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `head.k = 2, asked now: 3` for every value that differs."""
    for key in dict.fromkeys([*now, *(before if prefix else ())]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} = {old}, asked now: {new}"


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration in a run folder.

    Raises:
        InputError: this is no run folder.
        CacheError: its configuration is damaged, or of another format or version.
    """
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} is no run folder (no config.json); make one with palcache train-head CACHE --run {path}."
        )
    config: dict[str, Any] = read_json(path / "config.json", "a run's configuration")
    found = (config.get("format"), config.get("version")) if isinstance(config, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise CacheError(
            f"{path / 'config.json'} is of format {found[0]} version {found[1]}; expected {FORMAT} {VERSION}."
        )
    return config


def require_complete(path: Path) -> None:
    """Refuse a run whose training is not finished."""
    if not (path / "metrics.json").is_file():
        raise InputError(f"The run {path} is not finished; go on with palcache train-head ... --run {path} --resume.")


def load_run(path: Path) -> RunResult:
    """Read a complete run folder; its metrics are those that were written.

    Raises:
        InputError: there is no run at `path`, or it is not finished.
        CacheError: a file is missing, damaged or of another version.
    """
    if "imported" in read_config(path):
        raise InputError(
            f"The run {path} was imported, not trained; evaluate it with palcache evaluate {path} --cache ...."
        )
    require_complete(path)
    return RunResult(path, load_head(path / "head.safetensors"), read_evaluations(path), 0.0, None)


def read_evaluations(path: Path) -> dict[str, dict[str, Evaluation]]:
    """Return the evaluations of a complete run by split and rule, as they were written.

    Raises:
        CacheError: the file is missing or damaged.
    """
    metrics = read_json(path / "metrics.json", "a run's metrics")
    try:
        by_rule = {"head": metrics, **metrics["yardsticks"]}
        return {split: {rule: Evaluation.from_dict(by_rule[rule][split]) for rule in RULES} for split in EVALUATED}
    except (KeyError, TypeError) as error:
        raise CacheError(f"{path / 'metrics.json'} is damaged ({type(error).__name__}: {error}).") from error


def begin_run(path: Path, about: Mapping[str, Any]) -> None:
    """Make a run folder that says what is to be trained on what; `about` is from `describe_run`."""
    versions = {"palcache": palcache.__version__, "torch": torch.__version__}
    write_json(path / "config.json", {"format": FORMAT, "version": VERSION, "versions": versions, **about})


def finish_run(
    path: Path,
    head: TrainedHead,
    blind: TrainedHead,
    fitted: FitResult,
    splits: Mapping[str, RunSplit],
    *,
    picture: bool = True,
) -> RunResult:
    """Evaluate a trained head and write what its run folder keeps; the run is then complete.

    Args:
        path: a folder that `begin_run` made.
        head: the trained head; its `about` is the run's.
        blind: its user-blind yardstick.
        fitted: how training went.
        splits: train, val and test.
        picture: draw the curves, which takes longer than all the rest.
    """
    save_head(path / "head.safetensors", head)
    save_head(path / "user_blind.safetensors", blind)
    if head.shape.k > 1 and is_reducible(head.shape):
        _save_seen_users(path, head, splits)
    rules = {"head": head, "user_blind": blind}
    predictions = predict_splits(rules, splits, head.about["table"]["fingerprint"])
    save_predictions(path / PREDICTIONS, predictions)
    if has_prototypes(head.shape):
        save_prototypes(path / PROTOTYPES, describe_prototypes(head, splits["test"]))
    evaluations = {name: _evaluate(rules, predictions, name, splits[name]) for name in EVALUATED}
    write_history(path / "history.csv", fitted.history)
    if picture:
        draw_history(path / "curves.png", fitted.history, best_step=fitted.best_step, title=_title(head))
    summary = {"best_step": fitted.best_step, "stopped_early": fitted.stopped_early}
    write_json(path / "metrics.json", {**evaluations_to_dict(evaluations), **summary})
    (path / "state.safetensors").unlink(missing_ok=True)
    remove_leftovers(path)
    return RunResult(path, head, evaluations, fitted.seconds, fitted)


def evaluate_rules(
    head: TrainedHead, blind: TrainedHead | None, split: RunSplit, val: RunSplit | None
) -> dict[str, Evaluation]:
    """Return the evaluations of a head, of its user-blind yardstick and of "the longer response" on a split.

    Args:
        head: the head.
        blind: its yardstick, where there is one.
        split: what to evaluate on.
        val: where the temperature is fitted; None reports none.
    """
    rules = {"head": head} if blind is None else {"head": head, "user_blind": blind}
    predictions = predict_splits(rules, {"evaluated": split} if val is None else {"evaluated": split, "val": val})
    return _evaluate(rules, predictions, "evaluated", split)


def _evaluate(
    rules: Mapping[str, TrainedHead], predictions: Predictions, name: str, split: RunSplit
) -> dict[str, Evaluation]:
    """Return the evaluations of predictions, and where there are token states the accuracy at every token too."""
    found = evaluate_predictions(predictions, name, split.comparisons)
    if isinstance(split.data, TokenData):
        for rule, head in rules.items():
            found[rule] = replace(found[rule], token_accuracy=token_accuracy(head, split.data))
    return found


def _save_seen_users(path: Path, head: TrainedHead, splits: Mapping[str, RunSplit]) -> None:
    """Write what new users will need: the population's prior, and what is known of each seen user."""
    train, val = splits["train"].served, splits["val"].served
    population, posteriors, counts = describe_population(head.to(train.device), train, val)
    table = UserTable(head.users, posteriors, counts, population.prior, noise=population.noise)
    save_users(path / SEEN, table, path / "head.safetensors")


def _title(head: TrainedHead) -> str:
    kind = head_to_dict(head.shape)["head"]
    named = "" if kind == "pal-b" else f"{kind}, "
    width = f", p = {p}" if (p := getattr(head.shape, "p", None)) else ""
    return f"{head.about['table']['name']}: {named}k = {head.shape.k}{width}, seed {head.about['fit']['seed']}"
