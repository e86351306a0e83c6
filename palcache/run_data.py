"""What a run reads of a cache: the spaces that its head needs, and the splits of a table with their vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache, joint_space_of, spaces_of
from palcache.choices import EMBED_JOINT
from palcache.comparison_files import StoredComparisons
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, SplitConfig, UnknownUsers
from palcache.errors import InputError, MismatchError
from palcache.evaluation import known_rows
from palcache.heads import build_head
from palcache.joints import load_joint_preferences
from palcache.splits import split_comparisons
from palcache.tensors import PreferenceData, load_preferences
from palcache.training import require_vectors

EVALUATED: Final = ("val", "test")


@final
@dataclass(frozen=True, slots=True, eq=False)
class RunSplit:
    """Part of a table: its comparisons and their vectors, users numbered as the head's."""

    comparisons: Comparisons
    data: PreferenceData


def spaces_for(cache: Cache, stored: StoredComparisons, space: str | None, head: HeadConfig) -> dict[str, str]:
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


def check_vectors(cache: Cache, spaces: Mapping[str, str], head: HeadConfig, config: FitConfig) -> None:
    """Refuse what cannot be trained on the cache before anything is made."""
    shape = build_head(head, d=cache.space(spaces.get("joint", spaces.get("response", ""))).width, users=1)
    require_vectors(shape, config, joint="joint" in spaces, tokens=False)


def load_vectors(cache: Cache, stored: StoredComparisons, spaces: Mapping[str, str], device: str) -> PreferenceData:
    """Return a table's comparisons with their vectors in some spaces."""
    if "joint" in spaces:
        return load_joint_preferences(cache, replace(stored, joint_spaces=(spaces["joint"],)), device=device)
    return load_preferences(cache, replace(stored, spaces=((spaces["prompt"], spaces["response"]),)), device=device)


def load_splits(stored: StoredComparisons, data: PreferenceData, unknown_users: UnknownUsers) -> dict[str, RunSplit]:
    """Return train, val and test, none of them empty; the head's users are those with training comparisons."""
    comparisons = stored.comparisons
    rows = {name: split_rows(stored, name) for name in ("train", *EVALUATED)}
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
        out[name] = RunSplit(comparisons.take(kept), data.take(kept).with_users(users))
    return out


def own_spaces(path: Path, config: dict[str, Any], stored: StoredComparisons, cache: Cache) -> dict[str, str]:
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


def resplit(stored: StoredComparisons, split: SplitConfig | None) -> StoredComparisons:
    """Return a table split anew in memory, under its own name and fingerprint; None leaves it as it is."""
    if split is None:
        return stored
    return replace(stored, comparisons=split_comparisons(stored.comparisons, split))


def split_rows(stored: StoredComparisons, split: str | None) -> npt.NDArray[np.int64]:
    """Return the rows of a split of a table, none where it has no such split; None takes all rows."""
    column = stored.comparisons.split
    if split is None:
        return np.arange(len(stored.comparisons))
    names: list[str] = column.values.to_pylist() if column else []
    if column is None or split not in names:
        return np.empty(0, np.int64)
    return np.flatnonzero(column.codes == names.index(split))
