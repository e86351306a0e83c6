"""A table of comparisons as a run's head sees it: from the cache or from a file, on the vectors of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig
from palcache.errors import InputError, MismatchError
from palcache.files import read_json
from palcache.runs.inputs import load_vectors, served
from palcache.storage.comparison_files import StoredComparisons
from palcache.tables import read_comparisons
from palcache.tensors import PreferenceData
from palcache.users.adaptation import Population, describe_population
from palcache.users.reductions import ReducedComparisons, float64_device, reduce_comparisons
from palcache.users.user_files import SEEN, load_users


@final
@dataclass(frozen=True, slots=True, eq=False)
class OpenedTable:
    """A table on a run's vectors.

    Attributes:
        name: of the table.
        comparisons: the table.
        data: the same comparisons with their vectors; users numbered as in the table.
        head: the run's head, on the data's device.
    """

    name: str
    comparisons: Comparisons
    data: PreferenceData
    head: TrainedHead

    def reduce(self) -> ReducedComparisons:
        """Return the comparisons in terms of size k."""
        return reduce_comparisons(self.head, self.data)

    def take(self, rows: npt.NDArray[Any]) -> OpenedTable:
        """Return some of the comparisons, with only the users they have."""
        part = self.comparisons.take(rows)
        data = self.data.take(rows).with_users(part.users.values.to_pylist())
        return replace(self, comparisons=part, data=data)


def open_table(
    path: Path, cache: Cache, comparisons: str, head: TrainedHead, device: str, *, pool: bool = False
) -> OpenedTable:
    """Open a table of the cache, or a file whose texts the cache has, on the vectors of a run.

    Args:
        path: the run folder.
        cache: the cache.
        comparisons: name of a table, or a file.
        head: the run's head.
        device: where.
        pool: the comparisons are questions: a file needs neither `y` nor `user_id`.

    Raises:
        InputError: there is no such table and no such file.
        MismatchError: texts have no vector; the message has the command that adds them.
    """
    config = read_json(path / "config.json", "a run folder (config.json)")
    if "imported" in config:
        raise InputError(
            f"The run {path} was imported, not trained, and does not say what its users are like; train a head with palcache "
            "train-head."
        )
    spaces: dict[str, str] = config["spaces"]
    file = Path(comparisons)
    if comparisons in cache.comparison_names:
        stored, source = cache.comparisons(comparisons), "TABLE"
    elif file.is_file():
        table = read_comparisons([file], unlabelled=pool)
        stored, source = StoredComparisons(file.stem, table, "", (), {}), str(file)
    else:
        raise InputError(
            f"There is no table {comparisons} in {cache.path} (it has {', '.join(cache.comparison_names) or 'none'}) and no "
            "such file; name one of them with --comparisons."
        )
    missing, total = _missing(cache, stored, spaces)
    if missing:
        what, options = _embedding(cache, spaces)
        raise MismatchError(
            f"{missing} of {total} {what} of {stored.name} have no vector by {config['encoder'].get('model')} in "
            f"{cache.path}; add them with palcache embed {source} --cache {cache.path} "
            f"--model {config['encoder'].get('model')}{options}."
        )
    data = _load(cache, stored, config, device)
    return OpenedTable(stored.name, stored.comparisons, data, head.to(data.device))


def _load(cache: Cache, stored: StoredComparisons, config: Mapping[str, Any], device: str) -> PreferenceData:
    """Return a table as a run's rewards are served on it."""
    return served(load_vectors(cache, stored, config["spaces"], device, FitConfig.from_mapping(config["fit"])))


def _missing(cache: Cache, stored: StoredComparisons, spaces: Mapping[str, str]) -> tuple[int, int]:
    """Return how many texts of a table have no vector in a run's spaces, and how many it has."""
    keys = (
        {"prompt": stored.prompt_keys, "response": stored.response_keys}
        if "joint" not in spaces
        else {"joint": stored.joint_keys}
    )
    found = [
        cache.space(spaces[role]).find(wanted) >= 0 if spaces[role] in cache.space_ids else np.zeros(len(wanted), bool)
        for role, wanted in keys.items()
    ]
    return sum(int((~known).sum()) for known in found), sum(map(len, found))


def _embedding(cache: Cache, spaces: Mapping[str, str]) -> tuple[str, str]:
    """Return what a run's spaces hold vectors of, and the options of palcache embed that make them."""
    what, options = ("prompts with responses", " --items joint") if "joint" in spaces else ("texts", "")
    known = [cache.space(space).spec for space in spaces.values() if space in cache.space_ids]
    hidden = any(spec.get("encoder") == "hidden-states" for spec in known)
    return what, options + (" --encoder hidden" if hidden else "")


def population_of(path: Path, cache: Cache, opened: OpenedTable) -> Population:
    """Return the run's population: from its file, or from its table where the run is older than that file."""
    head = opened.head
    table = load_users(path / SEEN, path / "head.safetensors")
    if table is not None:
        where = float64_device(opened.data.device)
        return Population(head.mixtures.to(where).double(), table.prior.to(where), table.noise)
    config = read_json(path / "config.json", "a run folder (config.json)")
    name = config["table"]["name"]
    stored = cache.comparisons(name) if name in cache.comparison_names else None
    if stored is None or stored.fingerprint != config["table"]["fingerprint"] or stored.comparisons.split is None:
        raise MismatchError(
            f"The run {path} has no {SEEN}, and {cache.path} lacks its table {name}; train it again with palcache "
            "train-head, or name the cache that it was trained on."
        )
    data = _load(cache, stored, config, str(opened.data.device))
    column = stored.comparisons.split
    of_head = set(head.users)
    known = np.array([user in of_head for user in data.users], bool)[stored.comparisons.users.codes]
    names: list[str] = column.values.to_pylist()
    train, val = (
        data.take(np.flatnonzero(known & (column.codes == names.index(part)))).with_users(head.users)
        for part in ("train", "val")
    )
    return describe_population(head, train, val)[0]
