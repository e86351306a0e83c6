"""Users of a run as first-class things: list them, and suggest what to ask them next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead, load_head
from palcache.comparisons import Comparisons
from palcache.errors import InputError
from palcache.pairs import pair_codes
from palcache.runs.folders import read_config
from palcache.runs.opened_tables import OpenedTable, open_table, population_of
from palcache.users.adaptation import refuse_one_prototype
from palcache.users.posteriors import Gaussian, Posteriors, maximum_a_posteriori
from palcache.users.reductions import require_reducible
from palcache.users.suggestions import suggest
from palcache.users.user_files import ADAPTED, SEEN, UserTable, load_users

SAMPLES: Final = 256
"""Draws from a posterior that its uncertainty is told by."""


@final
@dataclass(frozen=True, slots=True)
class RunUser:
    """A user of a run.

    Attributes:
        user: id.
        kind: `seen`, trained with the head, or `adapted` later.
        comparisons: that the mixture rests on; None where the run does not say.
        mixture: weights over the prototypes.
        deviation: posterior standard deviation of each weight; None where the run does not say.
    """

    user: str
    kind: Literal["seen", "adapted"]
    comparisons: int | None
    mixture: tuple[float, ...]
    deviation: tuple[float, ...] | None


@final
@dataclass(frozen=True, slots=True)
class Question:
    """A comparison worth asking a user, with its texts.

    Attributes:
        row: its number in the pool, from 1.
        gain: expected gain in information, in nats.
        prompt: text.
        response_1: text.
        response_2: text.
    """

    row: int
    gain: float
    prompt: str
    response_1: str
    response_2: str


def list_users(path: Path) -> tuple[RunUser, ...]:
    """Return every user of a run, seen and adapted, with mixtures, counts and uncertainty."""
    read_config(path)
    head = load_head(path / "head.safetensors")
    seen = load_users(path / SEEN, path / "head.safetensors")
    adapted = load_users(path / ADAPTED, path / "head.safetensors")
    mixtures = head.mixtures.double()
    out = []
    if seen is None:
        out += [
            RunUser(user, "seen", None, tuple(w), None) for user, w in zip(head.users, mixtures.tolist(), strict=True)
        ]
    else:
        out += _describe(seen, mixtures, "seen")
    if adapted is not None:
        out += _describe(adapted, adapted.posteriors.mixtures, "adapted")
    return tuple(out)


def _describe(table: UserTable, mixtures: torch.Tensor, kind: Literal["seen", "adapted"]) -> list[RunUser]:
    out = []
    for at in torch.split(torch.arange(len(table.users)), 4_096):
        spread = table.posteriors.take(at).samples(SAMPLES).std(1) if table.deviation is None else table.deviation[at]
        columns = (at.tolist(), table.counts[at].tolist(), mixtures[at].tolist(), spread.tolist())
        out += [RunUser(table.users[i], kind, n, tuple(w), tuple(sd)) for i, n, w, sd in zip(*columns, strict=True)]
    return out


def suggest_run(  # noqa: PLR0913 - keyword-only options
    path: Path,
    cache: Cache,
    pool: str,
    *,
    user: str | None = None,
    support: str | None = None,
    count: int = 10,
    seed: int = 0,
    device: str = "auto",
) -> tuple[Question, ...]:
    """Return the comparisons of a pool whose answers would tell most about a user; labels in the pool are not read.

    Args:
        path: the run folder.
        cache: a cache with the texts.
        pool: name of a table of the cache, or a file; it needs neither `y` nor `user_id`.
        user: a user of the run, seen or adapted, or with `support` a user of that table; None is someone new.
        support: a table or file of what the user has answered; those pairs are not suggested again, nor are those of
            the pool's own rows of the user where there is none.
        count: how many.
        seed: of the draws from the user's posterior.
        device: where.

    Raises:
        InputError: the head is none that users are adapted on, or has one prototype, or it is not clear who is meant.
        MismatchError: texts are not in the cache.
    """
    read_config(path)
    head = load_head(path / "head.safetensors")
    require_reducible(head.shape)
    refuse_one_prototype(head.shape.k)
    opened = open_table(path, cache, pool, head, device, pool=True)
    answered = _answered(open_table(path, cache, support, head, device), user) if support is not None else None
    population = population_of(path, cache, opened)
    if answered is None:
        known = _known(path, user, population.prior, head)
    else:
        known = maximum_a_posteriori(answered.reduce().calibrated(population.noise), population.prior)
    rows = _unasked(opened.comparisons, answered.comparisons if answered else _of_user(opened.comparisons, user))
    if not len(rows):
        raise InputError(f"Every pair of {opened.name} has been answered already; give a larger pool.")
    reduced = opened.reduce().calibrated(population.noise)
    reduced = reduced.take(torch.from_numpy(rows).to(reduced.device))
    table = opened.comparisons
    prompts, responses = table.prompts.values, table.responses
    return tuple(
        Question(
            int(rows[found.row]) + 1,
            found.gain,
            prompts[table.prompts.codes[rows[found.row]]].as_py(),
            responses[table.response_1[rows[found.row]]].as_py(),
            responses[table.response_2[rows[found.row]]].as_py(),
        )
        for found in suggest(reduced, known, count, seed=seed)
    )


def _answered(opened: OpenedTable, user: str | None) -> OpenedTable:
    """Return the rows of the one user who is meant."""
    names: list[str] = opened.comparisons.users.values.to_pylist()
    if user is None and len(names) != 1:
        raise InputError(f"{opened.name} has {len(names)} users; say with --user whose answers they are.")
    if user is not None and user not in names:
        raise InputError(
            f"{opened.name} has no user {user!r}; give a table with that user's answers, or leave out --user."
        )
    code = 0 if user is None else names.index(user)
    return opened.take(np.flatnonzero(opened.comparisons.users.codes == code))


def _known(path: Path, user: str | None, prior: Gaussian, head: TrainedHead) -> Posteriors:
    """Return what the run knows of a user; of nobody in particular it knows the prior."""
    if user is None:
        return Posteriors(prior.mean[None], prior.covariance[None], require_reducible(head.shape).temperature)
    for name in (ADAPTED, SEEN):
        table = load_users(path / name, path / "head.safetensors")
        if table is not None and user in table.users:
            found = table.posteriors.take(torch.tensor([table.users.index(user)]))
            return Posteriors(found.mean.to(prior.mean), found.covariance.to(prior.mean), found.temperature)
    raise InputError(
        f"The run {path} does not know the user {user!r}; give the user's answers with --support, or leave out --user to "
        "ask someone new."
    )


def _of_user(pool: Comparisons, user: str | None) -> Comparisons | None:
    """Return what a user has answered in the pool itself; None for nothing."""
    names: list[str] = pool.users.values.to_pylist()
    return pool.take(np.flatnonzero(pool.users.codes == names.index(user))) if user in names else None


def _unasked(pool: Comparisons, answered: Comparisons | None) -> npt.NDArray[np.int64]:
    """Return the first row of each pair of the pool that was not answered, in order."""
    _, first = np.unique(pair_codes(pool), return_index=True)
    rows = np.sort(first).astype(np.int64)
    if answered is None:
        return rows
    done = {(prompt, *sorted(pair)) for prompt, *pair in _texts(answered, np.arange(len(answered)))}
    kept = [(prompt, *sorted(pair)) not in done for prompt, *pair in _texts(pool, rows)]
    open_rows: npt.NDArray[np.int64] = rows[np.array(kept, bool)]
    return open_rows


def _texts(table: Comparisons, rows: npt.NDArray[Any]) -> list[tuple[str, str, str]]:
    prompts: list[str] = table.prompts.values.to_pylist()
    responses: list[str] = table.responses.to_pylist()
    codes = (table.prompts.codes[rows].tolist(), table.response_1[rows].tolist(), table.response_2[rows].tolist())
    return [(prompts[p], responses[a], responses[b]) for p, a, b in zip(*codes, strict=True)]
