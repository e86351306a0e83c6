"""Seeded populations with known tastes: a readable sample in words, and planted PAL-B worlds in vector space."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from palcache.comparisons import Comparisons
from palcache.errors import InputError
from palcache.sentences import TOPICS, Response, Taste

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]
Row = dict[str, str | int]
"""One comparison with the keys `user_id, prompt, response_1, response_2, y, group, pair_id`; y is -1 or +1."""
Group = Literal["adventurous", "homely"]

SAMPLE_SEED: Final = 20240613
NEW_USERS_SEED: Final = 20240614
GROUPS: Final[tuple[Group, ...]] = ("adventurous", "homely")
_BLOCK: Final = 65_536  # comparisons whose ideal points stand in memory at once


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two replies to one prompt, of different tastes; the groups disagree about a contested pair."""

    prompt: str
    first: Response
    second: Response
    pair_id: str

    @property
    def contested(self) -> bool:
        return "careless" not in {self.first.taste, self.second.taste}


def sample_comparisons(
    seed: int = SAMPLE_SEED, users_per_group: int = 8, comparisons_per_user: int = 60, noise: float = 0.05
) -> Comparisons:
    """Return the comparisons of two groups of users with opposite tastes; equal arguments give equal tables.

    Users prefer a reply of their own taste to one of the other taste, and either to a careless one. No user sees a
    pair twice; a pair with a careless reply is half as likely as one of both tastes; a fair coin draws the sides.

    Args:
        seed: a non-negative integer.
        users_per_group: users `adventurous-00`, ... and as many `homely-00`, ...
        comparisons_per_user: at most the number of pairs that have a preferred reply (504).
        noise: probability in [0, 1] that a user's answer is turned round.

    Raises:
        InputError: an argument is out of its range.
    """
    rows = sample_rows(seed, users_per_group, comparisons_per_user, noise)
    return Comparisons.from_rows(rows, origin="the synthetic sample")


def sample_rows(
    seed: int = SAMPLE_SEED,
    users_per_group: int = 8,
    comparisons_per_user: int = 60,
    noise: float = 0.05,
    *,
    first_user: int = 0,
) -> list[Row]:
    """Return the rows of `sample_comparisons`, user by user, in the order in which they are drawn.

    Args:
        seed: as there, and so are the next three.
        users_per_group: see there.
        comparisons_per_user: see there.
        noise: see there.
        first_user: the number in the first user's name.

    Raises:
        InputError: an argument is out of its range.
    """
    pairs = _pairs()
    _require_counts(users_per_group=users_per_group, comparisons_per_user=comparisons_per_user)
    if comparisons_per_user > len(pairs):
        raise InputError(
            f"Got comparisons_per_user = {comparisons_per_user}; expected at most {len(pairs)}, all pairs."
        )
    if not 0 <= noise <= 1:
        raise InputError(f"Got noise = {noise}; expected a probability between 0 and 1.")
    numbers = range(first_user, first_user + users_per_group)
    width = max(2, len(str(numbers[-1])))
    users = [(f"{group}-{number:0{width}d}", group) for group in GROUPS for number in numbers]
    random = _generator(seed)
    # Only uniform doubles are drawn: NumPy's other distributions may change between its releases (NEP 19).
    keys = random.random((len(users), len(pairs))) * [1.0 if pair.contested else 2.0 for pair in pairs]
    chosen = np.argsort(keys, axis=1, kind="stable")[:, :comparisons_per_user]
    mirrored = random.random(chosen.shape) < 0.5
    flipped = random.random(chosen.shape) < noise
    return [
        _row(*users[i], pairs[chosen[i, j]], mirrored=bool(mirrored[i, j]), flipped=bool(flipped[i, j]))
        for i, j in np.ndindex(chosen.shape)
    ]


def write_sample(path: Path) -> None:
    """Write the default sample as JSON Lines (UTF-8, line feeds), always the same bytes; `path` is never partial."""
    _write_rows(path, sample_rows())


def write_new_users(path: Path) -> None:
    """Write four more users of each group, 40 comparisons each, as `write_sample` writes: users no head has seen."""
    _write_rows(path, sample_rows(NEW_USERS_SEED, 4, 40, first_user=8))


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _pairs() -> list[_Pair]:
    """Return every pair of replies with a defined preference; `07-2-5` is the 7th prompt's 2nd and 5th reply."""
    return [
        _Pair(topic.prompt, first, second, f"{number:02d}-{left}-{right}")
        for number, topic in enumerate(TOPICS, start=1)
        for (left, first), (right, second) in itertools.combinations(enumerate(topic.responses, start=1), 2)
        if first.taste != second.taste
    ]


def _row(user: str, group: Group, pair: _Pair, *, mirrored: bool, flipped: bool) -> Row:
    left, right = (pair.second, pair.first) if mirrored else (pair.first, pair.second)
    prefers_left = _liking(left.taste, group) > _liking(right.taste, group)
    return {
        "user_id": user,
        "prompt": pair.prompt,
        "response_1": left.text,
        "response_2": right.text,
        "y": -1 if prefers_left != flipped else 1,
        "group": group,
        "pair_id": pair.pair_id,
    }


def _liking(taste: Taste, group: Group) -> int:
    """Return how much a group likes a taste: its own 2, the other group's 1, careless 0."""
    return 0 if taste == "careless" else 1 + (taste == group)


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """A planted PAL-B world: what a head of the same shape would have to find.

    Attributes:
        item_map: f, from a response vector to the preference space, shape (p, d).
        prompt_maps: the prototypes g_1..g_k, from a prompt vector to the preference space, shape (k, p, d).
        mixtures: w, each user's weights of the prototypes, rows on the simplex, shape (u, k).
    """

    item_map: Floats
    prompt_maps: Floats
    mixtures: Floats


@dataclass(frozen=True, slots=True, eq=False)
class PlantedComparisons:
    """The n answers of a `Population` to random questions, with the truth they were drawn from.

    Attributes:
        prompt_vectors: distinct prompts, rows of norm 1, shape (prompts, d).
        response_vectors: distinct responses, rows of norm 1, shape (responses, d).
        user: who judged, shape (n,); users stand in order, each `per_user` times.
        prompt: row of `prompt_vectors`, shape (n,).
        response_1: row of `response_vectors`, shape (n,).
        response_2: another row of `response_vectors`, shape (n,).
        y: -1 response_1 preferred, +1 response_2, shape (n,).
        margins: the true cosine of response_2 minus that of response_1, in [-2, 2], shape (n,).
        probabilities: the true probability of y = +1, shape (n,).
    """

    prompt_vectors: Vectors
    response_vectors: Vectors
    user: Indices
    prompt: Indices
    response_1: Indices
    response_2: Indices
    y: npt.NDArray[np.int8]
    margins: Floats
    probabilities: Floats

    def __len__(self) -> int:
        """Return n."""
        return len(self.y)


def draw_population(*, seed: int, users: int, k: int, d: int, p: int, concentration: float = 0.3) -> Population:
    """Return a population with Gaussian linear maps and Dirichlet mixtures; equal arguments give equal populations.

    Args:
        seed: a non-negative integer; it may be the seed of `population_comparisons` too.
        users: the number of users.
        k: the number of prototypes.
        d: the width of prompt and response vectors.
        p: the width of the preference space.
        concentration: of the symmetric Dirichlet; below 1 most users lean to one prototype, far above 1 all are alike.

    Raises:
        InputError: an argument is out of its range.
    """
    _require_counts(users=users, k=k, d=d, p=p)
    _require_positive(concentration=concentration)
    random = _generator(seed, 1)
    return Population(
        item_map=random.standard_normal((p, d)) / math.sqrt(d),
        prompt_maps=random.standard_normal((k, p, d)) / math.sqrt(d),
        mixtures=random.dirichlet(np.full(k, concentration), size=users),
    )


def population_comparisons(
    population: Population, *, seed: int, prompts: int, responses: int, per_user: int, temperature: float
) -> PlantedComparisons:
    """Return answers with P(y = +1) = sigmoid(margin / temperature) (Bradley-Terry); equal arguments, equal answers.

    Margins are cos(f(response_2), a) - cos(f(response_1), a) in float64; the ideal point a is sum_j w_uj g_j(prompt).

    Args:
        population: who answers.
        seed: a non-negative integer.
        prompts: the number of distinct prompts.
        responses: the number of distinct responses, at least 2.
        per_user: comparisons of each user.
        temperature: in units of cosine; the smaller, the more certain the answers.

    Raises:
        InputError: an argument is out of its range.
    """
    _require_counts(prompts=prompts, per_user=per_user)
    _require_counts(2, responses=responses)
    _require_positive(temperature=temperature)
    random = _generator(seed, 2)
    user = np.repeat(np.arange(len(population.mixtures), dtype=np.int32), per_user)
    n, d = len(user), population.item_map.shape[1]
    prompt_vectors, response_vectors = _vectors(random, prompts, d), _vectors(random, responses, d)
    prompt = random.integers(prompts, size=n, dtype=np.int32)
    pair = _distinct(random, responses, n)
    margins = _true_margins(population, prompt_vectors, response_vectors, user, prompt, pair)
    probabilities = (1 + np.tanh(margins / (2 * temperature))) / 2
    return PlantedComparisons(
        prompt_vectors=prompt_vectors,
        response_vectors=response_vectors,
        user=user,
        prompt=prompt,
        response_1=pair[0],
        response_2=pair[1],
        y=np.where(random.random(n) < probabilities, 1, -1).astype(np.int8),
        margins=margins,
        probabilities=probabilities,
    )


def _vectors(random: np.random.Generator, rows: int, d: int) -> Vectors:
    """Return directions drawn uniformly from the sphere, rows of norm 1, shape (rows, d)."""
    return _unit(random.standard_normal((rows, d))).astype(np.float32)


def _distinct(random: np.random.Generator, responses: int, n: int) -> Indices:
    """Return n ordered pairs of two different responses, all equally likely, shape (2, n)."""
    left = random.integers(responses, size=n)
    right = (left + random.integers(1, responses, size=n)) % responses
    return np.stack([left, right]).astype(np.int32)


def _true_margins(
    population: Population, prompts: Vectors, responses: Vectors, user: Indices, prompt: Indices, pair: Indices
) -> Floats:
    """Return cos(f(pair[1]), a) - cos(f(pair[0]), a) in float64, shape (n,)."""
    left, right = pair
    items = _unit(responses.astype(np.float64) @ population.item_map.T)
    goals = np.einsum("kpd,qd->qkp", population.prompt_maps, prompts.astype(np.float64), optimize=True)
    margins = np.empty(len(user))
    for start in range(0, len(user), _BLOCK):
        rows = slice(start, start + _BLOCK)
        ideals = _unit(np.einsum("nk,nkp->np", population.mixtures[user[rows]], goals[prompt[rows]]))
        margins[rows] = np.einsum("np,np->n", ideals, items[right[rows]] - items[left[rows]])
    return margins


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _generator(seed: int, stream: int | None = None) -> np.random.Generator:
    """Return the generator of a seed; streams of one seed are independent, so that no draw repeats another's."""
    if seed < 0:
        raise InputError(f"Got seed = {seed}; expected a non-negative integer.")
    return np.random.Generator(np.random.PCG64(seed if stream is None else np.random.SeedSequence([seed, stream])))


def _require_counts(minimum: int = 1, /, **counts: int) -> None:
    for name, count in counts.items():
        if count < minimum:
            raise InputError(f"Got {name} = {count}; expected at least {minimum}.")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"Got {name} = {value}; expected a positive number.")
