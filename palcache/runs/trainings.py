"""Train a head on a cache and leave a run folder; evaluate one."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead, load_head, read_state, save_head, write_state
from palcache.configs import FitConfig, HeadConfig, SplitConfig, UnknownUsers
from palcache.errors import InputError, MismatchError, NumericsError, PalcacheWarning
from palcache.evaluation import Evaluation, known_rows
from palcache.heads import Head, blind_config, build_head
from palcache.runs.folders import (
    RunResult,
    begin_run,
    describe_run,
    evaluate_rules,
    finish_run,
    is_complete,
    load_run,
    read_config,
    require_complete,
)
from palcache.runs.inputs import (
    RunSplit,
    check_vectors,
    load_splits,
    load_vectors,
    own_spaces,
    resplit,
    spaces_for,
    split_rows,
)
from palcache.storage.comparison_files import StoredComparisons
from palcache.training import FitProgress, FitResult, FitState, fit
from palcache.users.user_files import ADAPTED, UserTable, load_users

__all__ = ["RunResult", "evaluate_run", "evaluate_run_splits", "load_run", "train_blind", "train_run"]

STATE_SECONDS: Final = 2.0
"""Least time between two writes of the state to go on from."""


def train_run(  # noqa: PLR0913 - keyword-only options
    cache: Cache,
    path: Path,
    *,
    comparisons: str | None = None,
    space: str | None = None,
    head: HeadConfig | None = None,
    config: FitConfig | None = None,
    device: str = "auto",
    unknown_users: UnknownUsers = "refuse",
    resume: bool = False,
    on_progress: Callable[[FitProgress], None] | None = None,
) -> RunResult:
    """Train a head on a cached table and leave a run folder.

    Training uses the table's `train` split, picks the checkpoint on `val`, and evaluates on `val` and `test`. The
    user-blind yardstick (k = 1; for a linear head a linear reward) is trained with the same settings and kept in the run.

    Args:
        cache: the cache.
        path: the run folder to be made.
        comparisons: name of the table; a cache with one table needs none.
        space: which encoder's vectors, where the table has several.
        head: shape of the head.
        config: optimizer, schedule, stopping and seed.
        device: `auto`, `cpu`, `cuda`, `mps`.
        unknown_users: what to do with users who have no training comparison.
        resume: go on with an unfinished run of the same settings.
        on_progress: called after each evaluation of the head, then of the yardstick.

    Raises:
        InputError: the folder exists and `resume` is false, a split is empty, or there is only one user; nothing is then
            left in the folder.
        MismatchError: `resume` is true and the run is of other settings.
        NumericsError: a vector or the loss is not finite; where no state was kept, the folder is gone again.
    """
    head, config = head or HeadConfig(), config or FitConfig()
    stored = cache.comparisons(comparisons)
    spaces = spaces_for(cache, stored, space, head, config)
    check_vectors(cache, spaces, head, config)
    about = describe_run(cache, stored, spaces, head, config, unknown_users)
    if is_complete(path, about, resume=resume):
        return load_run(path)
    data = load_vectors(cache, stored, spaces, device, config)
    splits = load_splits(stored, data, unknown_users)
    users = splits["train"].data.users
    shape = build_head(head, d=data.width, users=len(users))
    begin_run(path, about)
    fitted = _fit_resumably(path, shape, splits, config, on_progress)
    trained = TrainedHead(shape, fitted.parameters, users, about)
    save_head(path / "head.safetensors", trained)
    blind = train_blind(trained, splits, head, config, on_progress)
    return finish_run(path, trained, blind, fitted, splits)


def _with_adapted(head: TrainedHead, adapted: UserTable | None) -> TrainedHead:
    """Return a head with the users that were added to its run; one reward for all (k = 1) has no weights to take over."""
    if adapted is None:
        return head
    logits = adapted.posteriors.logits if head.shape.k > 1 else torch.zeros(len(adapted.users), 1)
    return head.with_adapted(adapted.users, logits)


def _fit_resumably(
    path: Path,
    shape: Head,
    splits: Mapping[str, RunSplit],
    config: FitConfig,
    on_progress: Callable[[FitProgress], None] | None,
) -> FitResult:
    state_path, saved = path / "state.safetensors", time.monotonic()

    def keep(state: FitState) -> None:
        nonlocal saved
        if time.monotonic() - saved >= STATE_SECONDS:
            write_state(state_path, state)
            saved = time.monotonic()

    state = read_state(state_path) if state_path.is_file() else None
    train, val = splits["train"].data, splits["val"].data
    try:
        return fit(shape, train, val, config, on_progress=on_progress, on_state=keep, state=state)
    except NumericsError:
        if not state_path.exists():  # nothing to go on from: leave the name free for another try
            (path / "config.json").unlink()
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def train_blind(
    head: TrainedHead,
    splits: Mapping[str, RunSplit],
    config: HeadConfig,
    fit_config: FitConfig,
    on_progress: Callable[[FitProgress], None] | None = None,
) -> TrainedHead:
    """Train the user-blind yardstick of a head with the same settings; a head that is blind already is its own.

    Args:
        head: the head.
        splits: what it was trained on.
        config: its configuration.
        fit_config: how it was trained.
        on_progress: called after each evaluation.
    """

    def relabel(event: FitProgress) -> None:
        if on_progress:
            on_progress(replace(event, rule="user_blind"))

    if is_blind(head.shape, config):
        return head
    shape = build_head(blind_config(config), d=head.shape.d, users=len(head.users))
    fitted = fit(shape, splits["train"].data, splits["val"].data, fit_config, on_progress=relabel)
    return TrainedHead(shape, fitted.parameters, head.users, head.about)


def is_blind(shape: Head, config: HeadConfig) -> bool:
    """Return whether a head has one reward for all: free weights of a single reward still have a sign."""
    return shape.k == 1 and config.user_weights == "simplex" and not shape.closed_form


def evaluate_run(
    path: Path,
    cache: Cache,
    *,
    comparisons: str | None = None,
    split: str | None = "test",
    device: str = "auto",
    unknown_users: UnknownUsers = "refuse",
) -> dict[str, Evaluation]:
    """Evaluate a run's head, users added to the run included, and the yardsticks on a table of a cache.

    Args:
        path: the run folder.
        cache: a cache with the spaces that the run was trained on.
        comparisons: name of the table; by default the run's own table where the cache has it, else its only one.
        split: which part of it; None takes all of it.
        device: where.
        unknown_users: what to do with users whom the head does not know.

    Returns:
        The evaluations of `head`, `user_blind` (not for an imported run) and `longer`.

    Raises:
        InputError: there is no finished run at `path`, or the table has no such split.
        MismatchError: the cache lacks the run's spaces, or a user is unknown and the policy is `refuse`.
        CacheError: a file of the run is missing, damaged or of another version.
    """
    head, blind, chosen, val = _open_evaluation(path, cache, comparisons, split, device, unknown_users)
    return evaluate_rules(head, blind, chosen, val)


def evaluate_run_splits(
    path: Path,
    cache: Cache,
    *,
    comparisons: str | None = None,
    split: str | None = "test",
    device: str = "auto",
    unknown_users: UnknownUsers = "refuse",
) -> dict[str, dict[str, Evaluation]]:
    """Evaluate as `evaluate_run` does; with the chosen split (`all` for None) comes `val`, if the table is the run's own."""
    head, blind, chosen, val = _open_evaluation(path, cache, comparisons, split, device, unknown_users)
    beside = {} if val is None else {"val": evaluate_rules(head, blind, val, val)}
    return {split or "all": evaluate_rules(head, blind, chosen, val), **beside}


def _warn_of_another_table(path: Path, stored: StoredComparisons, own: Mapping[str, Any]) -> None:
    """Say where a run is evaluated on another table than it was trained on, by whose split nothing was held back."""
    same = stored.name == own["name"]
    what = "has other comparisons or another split than when" if same else f"is not the table {own['name']} on which"
    warnings.warn(
        f"The table {stored.name} {what} {path} was trained: where they share comparisons, some of those evaluated may have "
        "been trained on.",
        PalcacheWarning,
        stacklevel=4,
    )


def _warn_of_support(path: Path, stored: StoredComparisons, adapted: UserTable | None) -> None:
    """Say where users of a table were added to a run, adapted to comparisons that may be among those evaluated."""
    known = set(adapted.users) if adapted else set()
    added = [name for name in stored.comparisons.users.values.to_pylist() if name in known]
    if added:
        warnings.warn(
            f"{len(added)} users of the table {stored.name} ({added[0]}, ...) were added to {path} by palcache adapt "
            "--save-users, on comparisons that may be among those evaluated; the curve of palcache adapt keeps them apart.",
            PalcacheWarning,
            stacklevel=4,
        )


def _open_evaluation(
    path: Path, cache: Cache, comparisons: str | None, split: str | None, device: str, unknown_users: UnknownUsers
) -> tuple[TrainedHead, TrainedHead | None, RunSplit, RunSplit | None]:
    """Return a run's head, its yardstick, the comparisons to evaluate on, and `val` if the table is the run's own."""
    config = read_config(path)
    imported = "imported" in config
    if not imported:
        require_complete(path)
    adapted = load_users(path / ADAPTED, path / "head.safetensors")
    head = _with_adapted(load_head(path / "head.safetensors"), adapted)
    blind = None if imported else _with_adapted(load_head(path / "user_blind.safetensors"), adapted)
    own = None if imported else config["table"]["name"]
    stored = cache.comparisons(own if comparisons is None and own in cache.comparison_names else comparisons)
    if imported:
        fit_config = FitConfig()
        spaces = spaces_for(cache, stored, None, HeadConfig(head="pal-a" if head.shape.joint else "pal-b"), fit_config)
    else:
        fit_config = FitConfig.from_mapping(config["fit"], origin=str(path / "config.json"))
        spaces = own_spaces(path, config, stored, cache)
    own_table = not imported and stored.fingerprint == config["table"]["fingerprint"]
    if not imported and not own_table:
        _warn_of_another_table(path, stored, config["table"])
    _warn_of_support(path, stored, adapted)
    if own_table and "split" in config:
        stored = resplit(stored, SplitConfig.from_mapping(config["split"], origin=str(path / "config.json")))
    data = load_vectors(cache, stored, spaces, device, fit_config)
    if data.width != head.shape.d:
        raise MismatchError(
            f"The head of {path} reads vectors of width {head.shape.d}, and those of the table {stored.name} in {cache.path} "
            f"have {data.width}; embed the table with the head's own encoder."
        )

    def part(name: str | None) -> RunSplit | None:
        rows = split_rows(stored, name)
        if not len(rows):
            return None
        kept = rows[known_rows(stored.comparisons.take(rows), head.users, unknown_users)]
        return RunSplit(stored.comparisons.take(kept), data.take(kept).with_users(head.users), kept)

    chosen = part(split)
    if chosen is None:
        have = stored.comparisons.split.values.to_pylist() if stored.comparisons.split else []
        raise InputError(
            f"The table {stored.name} has no comparisons in the split {split}; it has {', '.join(sorted(have)) or 'none'}: "
            "choose one with --split, or --split all."
        )
    validation = part("val") if own_table else None
    return head.to(data.device), blind.to(data.device) if blind else None, chosen, validation
