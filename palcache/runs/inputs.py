"""What a run reads of a cache: the spaces that its head needs, and the splits of a table with their vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache
from palcache.choices import EMBED_ALL_TOKENS, EMBED_JOINT, EMBED_JOINT_TOKENS
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig, SplitConfig, UnknownUsers
from palcache.errors import InputError, MismatchError
from palcache.evaluation import known_rows
from palcache.heads import build_head
from palcache.joints import load_joint_preferences
from palcache.splits import split_comparisons
from palcache.storage.comparison_files import StoredComparisons
from palcache.table_spaces import joint_space_of, spaces_of
from palcache.tensors import PreferenceData, load_preferences
from palcache.token_batches import TokenData, load_tokens
from palcache.training import require_vectors

EVALUATED: Final = ("val", "test")


@final
@dataclass(frozen=True, slots=True, eq=False)
class RunSplit:
    """Part of a table: its comparisons, their vectors or token states, users numbered as the head's, and their rows in it."""

    comparisons: Comparisons
    data: PreferenceData | TokenData
    rows: npt.NDArray[np.int64]

    @property
    def served(self) -> PreferenceData:
        """The comparisons as rewards are served: pooled, or on last states."""
        return served(self.data)


def served(data: PreferenceData | TokenData) -> PreferenceData:
    """Return comparisons as rewards are served: pooled, or on last states."""
    return data.served() if isinstance(data, TokenData) else data


def spaces_for(
    cache: Cache, stored: StoredComparisons, space: str | None, head: HeadConfig, config: FitConfig
) -> dict[str, str]:
    """Return the ids of the spaces that a head of a configuration reads, by role; for token losses those with tokens."""
    if config.token_weighting is not None:
        stored = _with_tokens(cache, stored, config)
    if head.head != "pal-a":
        prompt, response = spaces_of(stored, space, cache)
        return {"prompt": prompt, "response": response}
    if not stored.joint_spaces:
        raise InputError(
            f"PAL-A reads vectors of prompt and response in one forward, and the table {stored.name} has none in "
            f"{cache.path}; make them with {EMBED_JOINT_TOKENS if config.token_weighting else EMBED_JOINT}."
        )
    return {"joint": joint_space_of(stored, space, cache)}


def _with_tokens(cache: Cache, stored: StoredComparisons, config: FitConfig) -> StoredComparisons:
    """Return a table in those of its spaces that keep the states which a token loss needs, where there are such."""

    def keeps(space_id: str) -> bool:
        return "tokens" in cache.spec(space_id)

    pairs = tuple(pair for pair in stored.spaces if keeps(pair[1]))
    if config.prompt_alignment == "position":
        pairs = tuple(pair for pair in pairs if keeps(pair[0])) or pairs
    joint = tuple(space_id for space_id in stored.joint_spaces if keeps(space_id))
    return replace(stored, spaces=pairs or stored.spaces, joint_spaces=joint or stored.joint_spaces)


def check_vectors(cache: Cache, spaces: Mapping[str, str], head: HeadConfig, config: FitConfig) -> None:
    """Refuse what cannot be trained on the cache before anything is made."""
    items = cache.space(spaces.get("joint", spaces.get("response", "")))
    alignment = config.prompt_alignment if config.token_weighting and "tokens" in items.spec else None
    require_vectors(build_head(head, d=items.width, users=1), config, joint="joint" in spaces, alignment=alignment)
    if alignment == "position" and "prompt" in spaces and "tokens" not in cache.spec(spaces["prompt"]):
        raise InputError(
            "The prompt alignment position needs a vector at every token of the prompts, and the cache has those of "
            f"responses alone; make them with {EMBED_ALL_TOKENS}, or take --prompt-alignment pooled."
        )


def load_vectors(
    cache: Cache, stored: StoredComparisons, spaces: Mapping[str, str], device: str, config: FitConfig
) -> PreferenceData | TokenData:
    """Return a table's comparisons with their vectors in some spaces, or with token states where the loss is of tokens."""
    if config.token_weighting is not None:
        return load_tokens(cache, stored, spaces, alignment=config.prompt_alignment, device=device)
    if "joint" in spaces:
        return load_joint_preferences(cache, replace(stored, joint_spaces=(spaces["joint"],)), device=device)
    return load_preferences(cache, replace(stored, spaces=((spaces["prompt"], spaces["response"]),)), device=device)


def load_splits(
    stored: StoredComparisons, data: PreferenceData | TokenData, unknown_users: UnknownUsers
) -> dict[str, RunSplit]:
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
        out[name] = RunSplit(comparisons.take(kept), data.take(kept).with_users(users), kept)
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
