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
  curves.png
  state.safetensors     where to go on; only while training is unfinished
```
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

import palcache
from palcache.adaptation import describe_population
from palcache.cache import Cache, joint_space_of, spaces_of
from palcache.checkpoints import TrainedHead, load_head, read_state, save_head, write_state
from palcache.choices import EMBED_JOINT
from palcache.comparison_files import StoredComparisons
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, UnknownUsers
from palcache.errors import CacheError, InputError, MismatchError, NumericsError
from palcache.evaluation import Evaluation, evaluate_head, evaluate_longer, known_rows
from palcache.files import read_json, write_json
from palcache.heads import Head, blind_config, build_head
from palcache.joints import load_joint_preferences
from palcache.reductions import is_reducible
from palcache.reports import draw_history, write_history
from palcache.tensors import PreferenceData, load_preferences
from palcache.training import FitProgress, FitResult, FitState, fit, require_vectors
from palcache.user_files import ADAPTED, SEEN, UserTable, load_users, save_users

FORMAT: Final = "palcache-run"
VERSION: Final = 1
STATE_SECONDS: Final = 2.0
"""Least time between two writes of the state to go on from."""
EVALUATED: Final = ("val", "test")
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


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """Part of a table: its comparisons and their vectors, users numbered as the head's."""

    comparisons: Comparisons
    data: PreferenceData


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
    spaces = _spaces_for(cache, stored, space, head)
    _check_vectors(cache, spaces, head, config)
    about = _about(cache, stored, spaces, head, config, unknown_users)
    if _is_complete(path, about, resume=resume):
        return load_run(path)
    data = _load(cache, stored, spaces, device)
    splits = _splits(stored, data, unknown_users)
    users = splits["train"].data.users
    shape = build_head(head, d=data.width, users=len(users))
    versions = {"palcache": palcache.__version__, "torch": torch.__version__}
    write_json(path / "config.json", {"format": FORMAT, "version": VERSION, "versions": versions, **about})
    fitted = _fit_resumably(path, shape, splits, config, on_progress)
    trained = TrainedHead(shape, fitted.parameters, users, about)
    save_head(path / "head.safetensors", trained)
    if shape.k > 1 and is_reducible(shape):
        _save_seen_users(path, trained, splits)
    blind = _user_blind(path, trained, splits, head, config, on_progress)
    evaluations = {name: _evaluate(trained, blind, splits[name], splits["val"]) for name in EVALUATED}
    write_history(path / "history.csv", fitted.history)
    title = _title(stored.name, head, shape, config)
    draw_history(path / "curves.png", fitted.history, best_step=fitted.best_step, title=title)
    summary = {"best_step": fitted.best_step, "stopped_early": fitted.stopped_early}
    write_json(path / "metrics.json", {**evaluations_to_dict(evaluations), **summary})
    for leftover in (path / "state.safetensors", *path.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)
    return RunResult(path, trained, evaluations, fitted.seconds, fitted)


def _save_seen_users(path: Path, head: TrainedHead, splits: Mapping[str, _Split]) -> None:
    """Write what new users will need: the population's prior, and what is known of each seen user."""
    train, val = splits["train"].data, splits["val"].data
    population, posteriors, counts = describe_population(head.to(train.device), train, val)
    table = UserTable(head.users, posteriors, counts, population.prior, noise=population.noise)
    save_users(path / SEEN, table, path / "head.safetensors")


def _with_adapted(head: TrainedHead, adapted: UserTable | None) -> TrainedHead:
    """Return a head with the users that were added to its run; one reward for all (k = 1) has no weights to take over."""
    if adapted is None:
        return head
    logits = adapted.posteriors.logits if head.shape.k > 1 else torch.zeros(len(adapted.users), 1)
    return head.with_adapted(adapted.users, logits)


def _spaces_for(cache: Cache, stored: StoredComparisons, space: str | None, head: HeadConfig) -> dict[str, str]:
    """Return the ids of the spaces that a head of a configuration reads, by role."""
    if head.head != "pal-a":
        prompt, response = spaces_of(stored, space, cache)
        return {"prompt": prompt, "response": response}
    if not stored.joint_spaces:
        raise InputError(
            f"PAL-A reads vectors of prompt and response in one forward, and the table {stored.name} has none in "
            f"{cache.path}; make them with {EMBED_JOINT}."
        )
    return {"joint": joint_space_of(stored, space, cache)}


def _check_vectors(cache: Cache, spaces: Mapping[str, str], head: HeadConfig, config: FitConfig) -> None:
    """Refuse what cannot be trained on the cache before anything is made."""
    shape = build_head(head, d=cache.space(spaces.get("joint", spaces.get("response", ""))).width, users=1)
    require_vectors(shape, config, joint="joint" in spaces, tokens=False)


def _load(cache: Cache, stored: StoredComparisons, spaces: Mapping[str, str], device: str) -> PreferenceData:
    """Return a table's comparisons with their vectors in some spaces."""
    if "joint" in spaces:
        return load_joint_preferences(cache, replace(stored, joint_spaces=(spaces["joint"],)), device=device)
    return load_preferences(cache, replace(stored, spaces=((spaces["prompt"], spaces["response"]),)), device=device)


def _title(table: str, head: HeadConfig, shape: Head, config: FitConfig) -> str:
    kind = "" if head.head == "pal-b" else f"{head.head}, "
    width = f", p = {p}" if (p := getattr(shape, "p", None)) else ""
    return f"{table}: {kind}k = {shape.k}{width}, seed {config.seed}"


def _about(
    cache: Cache,
    stored: StoredComparisons,
    spaces: Mapping[str, str],
    head: HeadConfig,
    config: FitConfig,
    unknown_users: UnknownUsers,
) -> dict[str, Any]:
    """Return what a run must agree on to be continued, and a cache to be evaluated."""
    return {
        "table": {**stored.about, "name": stored.name, "fingerprint": stored.fingerprint},
        "spaces": dict(spaces),
        "encoder": dict(cache.about(spaces.get("joint", spaces.get("prompt", "")))),
        "head": head.to_dict(),
        "fit": config.to_dict(),
        "unknown_users": unknown_users,
    }


def _is_complete(path: Path, about: dict[str, Any], *, resume: bool) -> bool:
    """Refuse a folder that is taken or cannot be continued; return whether its run is complete already."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not (path / "config.json").is_file():
        raise InputError(f"{path} exists and is no run folder; name a new one with --run.")
    if not resume:
        raise InputError(f"The run {path} exists; name a new folder with --run, or continue it with --resume.")
    differing = list(_differences(_read_config(path), about))
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


def _read_config(path: Path) -> dict[str, Any]:
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


def _require_complete(path: Path) -> None:
    if not (path / "metrics.json").is_file():
        raise InputError(f"The run {path} is not finished; go on with palcache train-head ... --run {path} --resume.")


def _splits(stored: StoredComparisons, data: PreferenceData, unknown_users: UnknownUsers) -> dict[str, _Split]:
    """Return train, val and test, none of them empty; the head's users are those with training comparisons."""
    comparisons = stored.comparisons
    rows = {name: _rows_of(stored, name) for name in ("train", *EVALUATED)}
    for name, at in rows.items():
        if not len(at):
            have = ", ".join(sorted(comparisons.split.values.to_pylist())) if comparisons.split else "none"
            raise InputError(
                f"The split {name} of the table {stored.name} is empty (it has {have}); embed it again with --split-by pair."
            )
    users = tuple(comparisons.users.take(rows["train"]).values.to_pylist())
    if len(users) < 2:
        raise InputError(
            f"The table {stored.name} has one user in its training split ({users[0]!r}); a pluralistic head needs two or "
            "more."
        )
    out = {}
    for name, at in rows.items():
        kept = at[known_rows(comparisons.take(at), users, unknown_users)]
        if not len(kept):
            raise InputError(
                f"No user of the split {name} of the table {stored.name} has a training comparison; embed it again with "
                "--split-by pair, or score them with the mean mixture by --unknown-users generic."
            )
        out[name] = _Split(comparisons.take(kept), data.take(kept).with_users(users))
    return out


def _fit_resumably(
    path: Path,
    shape: Head,
    splits: Mapping[str, _Split],
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


def _user_blind(
    path: Path,
    head: TrainedHead,
    splits: Mapping[str, _Split],
    config: HeadConfig,
    fit_config: FitConfig,
    on_progress: Callable[[FitProgress], None] | None,
) -> TrainedHead:
    def relabel(event: FitProgress) -> None:
        if on_progress:
            on_progress(replace(event, rule="user_blind"))

    blind_already = config.user_weights == "simplex" and not head.shape.closed_form
    if head.shape.k == 1 and blind_already:  # free weights of one reward still have a sign
        blind = head
    else:
        shape = build_head(blind_config(config), d=head.shape.d, users=len(head.users))
        fitted = fit(shape, splits["train"].data, splits["val"].data, fit_config, on_progress=relabel)
        blind = TrainedHead(shape, fitted.parameters, head.users, head.about)
    save_head(path / "user_blind.safetensors", blind)
    return blind


def _evaluate(head: TrainedHead, blind: TrainedHead | None, split: _Split, val: _Split | None) -> dict[str, Evaluation]:
    validation = val.data if val else None
    out = {"head": evaluate_head(head, split.data, split.comparisons, validation=validation)}
    if blind is not None:
        out["user_blind"] = evaluate_head(blind, split.data, split.comparisons, validation=validation)
    return {**out, "longer": evaluate_longer(split.comparisons)}


def load_run(path: Path) -> RunResult:
    """Read a complete run folder; its metrics are those that were written.

    Raises:
        InputError: there is no run at `path`, or it is not finished.
        CacheError: a file is missing, damaged or of another version.
    """
    if "imported" in _read_config(path):
        raise InputError(
            f"The run {path} was imported, not trained; evaluate it with palcache evaluate {path} --cache ...."
        )
    _require_complete(path)
    metrics = read_json(path / "metrics.json", "a run's metrics")
    try:
        by_rule = {"head": metrics, **metrics["yardsticks"]}
        evaluations = {
            split: {rule: Evaluation.from_dict(by_rule[rule][split]) for rule in RULES} for split in EVALUATED
        }
    except (KeyError, TypeError) as error:
        raise CacheError(f"{path / 'metrics.json'} is damaged ({type(error).__name__}: {error}).") from error
    return RunResult(path, load_head(path / "head.safetensors"), evaluations, 0.0, None)


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
    config = _read_config(path)
    imported = "imported" in config
    if not imported:
        _require_complete(path)
    adapted = load_users(path / ADAPTED, path / "head.safetensors")
    head = _with_adapted(load_head(path / "head.safetensors"), adapted)
    blind = None if imported else _with_adapted(load_head(path / "user_blind.safetensors"), adapted)
    own = None if imported else config["table"]["name"]
    stored = cache.comparisons(own if comparisons is None and own in cache.comparison_names else comparisons)
    if imported:
        spaces = _spaces_for(cache, stored, None, HeadConfig(head="pal-a" if head.shape.joint else "pal-b"))
    else:
        spaces = _own_spaces(path, config, stored, cache)
    data = _load(cache, stored, spaces, device)
    if data.width != head.shape.d:
        raise MismatchError(
            f"The head of {path} reads vectors of width {head.shape.d}, and those of the table {stored.name} in {cache.path} "
            f"have {data.width}; embed the table with the head's own encoder."
        )

    def part(name: str | None) -> _Split | None:
        rows = _rows_of(stored, name)
        if not len(rows):
            return None
        kept = rows[known_rows(stored.comparisons.take(rows), head.users, unknown_users)]
        return _Split(stored.comparisons.take(kept), data.take(kept).with_users(head.users))

    chosen = part(split)
    if chosen is None:
        have = stored.comparisons.split.values.to_pylist() if stored.comparisons.split else []
        raise InputError(
            f"The table {stored.name} has no comparisons in the split {split}; it has {', '.join(sorted(have)) or 'none'}: "
            "choose one with --split, or --split all."
        )
    own_table = not imported and stored.fingerprint == config["table"]["fingerprint"]
    validation = part("val") if own_table else None
    where = data.device
    return _evaluate(head.to(where), blind.to(where) if blind else None, chosen, validation)


def _own_spaces(path: Path, config: dict[str, Any], stored: StoredComparisons, cache: Cache) -> dict[str, str]:
    """Return the spaces that a run was trained on, which a table must be embedded in."""
    spaces: dict[str, str] = config["spaces"]
    first = spaces["joint"] if "joint" in spaces else spaces["prompt"]
    found = first in stored.joint_spaces if "joint" in spaces else (first, spaces["response"]) in stored.spaces
    if not found:
        raise MismatchError(
            f"The run {path} was trained on the vectors of {config['encoder'].get('model')} (space {first[:8]}), and "
            f"the table {stored.name} in {cache.path} is not embedded by it; embed it with that model, or name its cache."
        )
    return spaces


def _rows_of(stored: StoredComparisons, split: str | None) -> npt.NDArray[np.int64]:
    column = stored.comparisons.split
    if split is None:
        return np.arange(len(stored.comparisons))
    names: list[str] = column.values.to_pylist() if column else []
    if column is None or split not in names:
        return np.empty(0, np.int64)
    return np.flatnonzero(column.codes == names.index(split))
