"""A run folder: one trained head with its configuration, fingerprints, history, metrics and picture.

```
RUN/
  config.json           what was trained on what: configurations, fingerprints of cache and table, versions
  head.safetensors      the head of the lowest validation loss, its users included
  user_blind.safetensors  the k = 1 yardstick, trained with the same settings
  history.csv           every evaluation
  metrics.json          test and validation, yardsticks beside them; no wall times: the same seed gives the same bytes
  curves.png
  state.safetensors     where to go on; only while training is unfinished
```
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from palcache.cache import Cache, spaces_of
from palcache.checkpoints import TrainedHead, load_head, save_head
from palcache.comparison_files import StoredComparisons
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, UnknownUsers
from palcache.errors import InputError, MismatchError
from palcache.evaluation import Evaluation, evaluate_head, evaluate_longer, known_rows
from palcache.files import read_json, storage_errors, write_bytes, write_json, write_with
from palcache.heads import Head, blind_config, build_head
from palcache.joint_vectors import joint_space_of, load_joint_preferences
from palcache.reports import draw_history
from palcache.tensors import PreferenceData, load_preferences
from palcache.training import FitProgress, FitResult, FitState, HistoryRow, fit, require_vectors

FORMAT: Final = "palcache-run"
VERSION: Final = 1
STATE_SECONDS: Final = 2.0
EVALUATED: Final = ("val", "test")


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
        on_progress: called after each evaluation.

    Raises:
        InputError: the folder exists and `resume` is false, a split is empty, or there is only one user.
        MismatchError: `resume` is true and the run is of other settings.
        NumericsError: a vector or the loss is not finite.
    """
    head, config = head or HeadConfig(), config or FitConfig()
    stored = cache.comparisons(comparisons)
    about = _about(cache, stored, space, head, config)
    joint = _check_vectors(cache, stored, space, head, config)
    if _begin(path, about, resume=resume):
        return load_run(path)
    data = _load(cache, stored, space, device, joint=joint)
    splits = _splits(stored, data, unknown_users)
    if "test" not in splits:
        raise InputError(f"The split test of the table {stored.name} is empty; embed it again with --split-by pair.")
    users = splits["train"].data.users
    shape = build_head(head, d=data.width, users=len(users))
    fitted = _fit_resumably(path, shape, splits, config, on_progress)
    trained = TrainedHead(shape, fitted.parameters, users, about)
    save_head(path / "head.safetensors", trained)
    blind = _user_blind(path, trained, splits, head, config)
    evaluations = {name: _evaluate(trained, blind, splits[name], splits["val"]) for name in EVALUATED}
    _write_history(path / "history.csv", fitted.history)
    title = _title(stored.name, head, shape, config)
    draw_history(path / "curves.png", fitted.history, best_step=fitted.best_step, title=title)
    summary = {"best_step": fitted.best_step, "stopped_early": fitted.stopped_early}
    write_json(path / "metrics.json", {**evaluations_to_dict(evaluations), **summary})
    (path / "state.safetensors").unlink(missing_ok=True)
    return RunResult(path, trained, evaluations, fitted.seconds, fitted)


def _check_vectors(
    cache: Cache, stored: StoredComparisons, space: str | None, head: HeadConfig, config: FitConfig
) -> bool:
    """Refuse what cannot be trained on the cache before anything is made; return whether joint vectors are read."""
    joint = head.head == "pal-a"
    read = joint_space_of(cache, stored, space) if joint else spaces_of(stored, space, cache)[1]
    shape = build_head(head, d=cache.space(read).width, users=1)
    require_vectors(shape, config, joint=shape.joint, tokens=False)
    return shape.joint


def _load(cache: Cache, stored: StoredComparisons, space: str | None, device: str, *, joint: bool) -> PreferenceData:
    load = load_joint_preferences if joint else load_preferences
    return load(cache, stored, space=space, device=device)


def _title(table: str, head: HeadConfig, shape: Head, config: FitConfig) -> str:
    kind = "" if head.head == "pal-b" else f"{head.head}, "
    width = f", p = {p}" if (p := getattr(shape, "p", None)) else ""
    return f"{table}: {kind}k = {shape.k}{width}, seed {config.seed}"


def _about(
    cache: Cache, stored: StoredComparisons, space: str | None, head: HeadConfig, config: FitConfig
) -> dict[str, Any]:
    """Return what a run must agree on to be continued, and a cache to be evaluated."""
    prompt, response = spaces_of(stored, space, cache)
    return {
        "table": {"name": stored.name, "fingerprint": stored.fingerprint, **stored.about},
        "spaces": {"prompt": prompt, "response": response},
        "encoder": dict(cache.about(prompt)),
        "head": head.to_dict(),
        "fit": config.to_dict(),
    }


def _begin(path: Path, about: dict[str, Any], *, resume: bool) -> bool:
    """Make the run folder or check that it can be continued; return whether it is complete already."""
    config_path = path / "config.json"
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not config_path.is_file():
            raise InputError(f"{path} exists and is no run folder; name a new one with --run.")
        if not resume:
            raise InputError(f"The run {path} exists; name a new folder with --run, or continue it with --resume.")
        before = read_json(config_path, "a run's configuration")
        differing = [key for key in about if before.get(key) != about[key]]
        if differing:
            raise MismatchError(
                f"The run {path} cannot be continued: its {', '.join(differing)} differ from what is asked now; give the "
                "same options, or a new --run."
            )
        return (path / "metrics.json").is_file()
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    write_json(config_path, {"format": FORMAT, "version": VERSION, **about})
    return False


def _splits(stored: StoredComparisons, data: PreferenceData, unknown_users: UnknownUsers) -> dict[str, _Split]:
    """Return the table's non-empty splits; the head's users are those with training comparisons."""
    comparisons = stored.comparisons
    if comparisons.split is None:
        raise InputError(f"The table {stored.name} has no split; embed it again with --split-by pair.")
    names: list[str] = comparisons.split.values.to_pylist()
    rows = {name: np.flatnonzero(comparisons.split.codes == code) for code, name in enumerate(names)}
    for name in ("train", "val"):
        if not len(rows.get(name, ())):
            raise InputError(
                f"The split {name} of the table {stored.name} is empty (it has {', '.join(sorted(names))}); embed it "
                "again with --split-by pair."
            )
    users = tuple(comparisons.users.take(rows["train"]).values.to_pylist())
    if len(users) < 2:
        raise InputError(
            f"The table {stored.name} has one user in its training split ({users[0]!r}); a pluralistic head needs two or "
            "more."
        )
    out = {}
    for name, at in rows.items():
        if len(at):
            part = comparisons.take(at)
            kept = at[known_rows(part, users, unknown_users)]
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
            _write_state(state_path, state)
            saved = time.monotonic()

    state = _read_state(state_path) if state_path.is_file() else None
    train, val = splits["train"].data, splits["val"].data
    return fit(shape, train, val, config, on_progress=on_progress, on_state=keep, state=state)


def _user_blind(
    path: Path, head: TrainedHead, splits: Mapping[str, _Split], config: HeadConfig, fit_config: FitConfig
) -> TrainedHead:
    if head.shape.k == 1 and config.user_weights == "simplex":  # free weights of one reward still have a sign
        blind = head
    else:
        shape = build_head(blind_config(config), d=head.shape.d, users=len(head.users))
        fitted = fit(shape, splits["train"].data, splits["val"].data, fit_config)
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
        InputError: the run is not complete.
        CacheError: a file is missing or damaged.
    """
    read_json(path / "config.json", "a run folder (config.json)")
    if "imported" in read_json(path / "config.json", "a run's configuration"):
        raise InputError(
            f"The run {path} was imported, not trained; evaluate it with palcache evaluate {path} --cache ...."
        )
    if not (path / "metrics.json").is_file():
        raise InputError(f"The run {path} is not finished; go on with palcache train-head ... --run {path} --resume.")
    metrics = read_json(path / "metrics.json", "a run's metrics")
    evaluations: dict[str, dict[str, Evaluation]] = {}
    for split in EVALUATED:
        evaluations[split] = {"head": Evaluation.from_dict(metrics[split])}
        evaluations[split] |= {
            rule: Evaluation.from_dict(by_split[split]) for rule, by_split in metrics["yardsticks"].items()
        }
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
    """Evaluate a run's head and the yardsticks on a table of a cache.

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
        MismatchError: the cache lacks the run's spaces, or a user is unknown and the policy is `refuse`.
    """
    config = read_json(path / "config.json", "a run folder (config.json)")
    imported = "imported" in config
    head = load_head(path / "head.safetensors")
    blind = None if imported else load_head(path / "user_blind.safetensors")
    own = None if imported else config["table"]["name"]
    stored = cache.comparisons(own if comparisons is None and own in cache.comparison_names else comparisons)
    spaces = spaces_of(stored, None, cache) if imported else _own_spaces(path, config, stored, cache)
    data = _load(cache, replace(stored, spaces=(spaces,)), None, device, joint=head.shape.joint)
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


def _own_spaces(path: Path, config: dict[str, Any], stored: StoredComparisons, cache: Cache) -> tuple[str, str]:
    """Return the spaces that a run was trained on, which a table must be embedded in."""
    spaces = (config["spaces"]["prompt"], config["spaces"]["response"])
    if spaces not in stored.spaces:
        raise MismatchError(
            f"The run {path} was trained on the vectors of {config['encoder'].get('model')} (space {spaces[0][:8]}), and "
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


def _write_history(path: Path, history: tuple[HistoryRow, ...]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [field.name for field in fields(HistoryRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in history)
    write_bytes(path, buffer.getvalue().encode())


def _write_state(path: Path, state: FitState) -> None:
    tensors = {f"now/{name}": value.cpu() for name, value in state.parameters.items()}
    tensors |= {f"best/{name}": value.cpu() for name, value in state.best.items()}
    tensors |= {f"moment/{name}": value.cpu() for name, value in state.moments.items()}
    rows = [[getattr(row, field.name) for field in fields(HistoryRow)] for row in state.history]
    tensors["history"] = torch.tensor(rows, dtype=torch.float64)
    tensors["step"] = torch.tensor(state.step)
    write_with(path, lambda temporary: save_file(tensors, temporary))


def _read_state(path: Path) -> FitState | None:
    """Return the state to go on from; None where it cannot be read, so that training starts anew."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return None

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    rows = tuple(HistoryRow(int(row[0]), *row[1:]) for row in tensors["history"].tolist())
    return FitState(int(tensors["step"]), part("now/"), part("best/"), part("moment/"), rows)
