"""Batches hold the vectors of the comparisons' own texts, resident or streamed, each distinct one once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache import tensors, vector_tables
from palcache.cache import Cache
from palcache.configs import StoredDtype
from palcache.errors import InputError, MismatchError, NumericsError
from palcache.storage.comparison_files import StoredComparisons
from palcache.tensors import PreferenceData, VectorTable, load_preferences
from tests.worlds import KnownVectors, Row, known_vectors, make_cache

PROMPTS, RESPONSES, D, USERS, N = 5, 11, 6, 4, 37


def random_rows(n: int = N, *, prompts: int = PROMPTS, responses: int = RESPONSES, seed: int = 0) -> list[Row]:
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(n):
        left = int(random.integers(responses))
        rows.append(
            {
                "user_id": f"user {random.integers(USERS)}",
                "prompt": f"prompt {random.integers(prompts)}",
                "response_1": f"response {left}",
                "response_2": f"response {(left + 1 + random.integers(responses - 1)) % responses}",
                "y": int(random.choice([-1, 1])),
            }
        )
    return rows


@pytest.fixture(scope="module")
def encoder() -> KnownVectors:
    """Return known vectors of width 6, exact in every stored type."""
    random = np.random.default_rng(1)
    prompts, responses = (
        (random.integers(-99, 99, (rows, D)) / 64).astype(np.float32) for rows in (PROMPTS, RESPONSES)
    )
    return known_vectors(prompts, responses)


@pytest.fixture(scope="module")
def cache(encoder: KnownVectors, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache of several shards, in which an earlier table has mixed the rows up."""
    path = tmp_path_factory.mktemp("tensors") / "cache"
    make_cache(path, random_rows()[:20:-1], encoder, name="earlier", shard_rows=4)
    return make_cache(path, random_rows(), encoder, shard_rows=4)


@pytest.fixture(params=["resident", "streamed"])
def load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Cache], PreferenceData]:
    """Return `load_preferences` with all vectors in memory, or none."""
    if request.param == "streamed":
        monkeypatch.setattr(tensors, "MEMORY_SHARE", 0)

    def load(cache: Cache) -> PreferenceData:
        data = load_preferences(cache, cache.comparisons("table"), device="cpu")
        assert data.streamed == (request.param == "streamed")
        return data

    return load


def test_a_batch_holds_the_vectors_of_its_texts(
    cache: Cache, encoder: KnownVectors, load: Callable[[Cache], PreferenceData]
) -> None:
    data, rows = load(cache), random_rows()
    assert (len(data), data.width, data.device.type) == (N, D, "cpu")
    picked = [3, 30, 3, 0, 17]
    batch = data.batch(torch.tensor(picked))
    for at, row in enumerate(rows[i] for i in picked):
        for vectors, index, name, role in (
            (batch.prompts, batch.prompt, "prompt", "prompt"),
            (batch.responses, batch.response_1, "response_1", "response"),
            (batch.responses, batch.response_2, "response_2", "response"),
        ):
            expected = encoder.vectors["prompt" if role == "prompt" else "response", str(row[name])]
            assert vectors[index[at]].tolist() == expected.tolist()
        assert data.users[int(batch.user[at])] == row["user_id"]
        assert float(batch.y[at]) == row["y"]
    assert batch.prompts.dtype == batch.responses.dtype == batch.y.dtype == torch.float32


@pytest.mark.parametrize("whole", [True, False])
def test_repeated_vectors_stand_once_in_a_batch(
    cache: Cache, load: Callable[[Cache], PreferenceData], monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> None:
    """A table that is hardly longer than what is found in it is read whole, of another each distinct row, with padding."""
    monkeypatch.setattr(vector_tables, "WHOLE_SHARE", 0.9 if whole else 2.0)
    monkeypatch.setattr(vector_tables, "ROWS", 1)
    data = load(cache)
    rows = torch.arange(len(data)).repeat(6)
    batch = data.batch(rows)
    for table, vectors, names, references in (
        (data.prompts, batch.prompts, batch.prompt_names, (data.prompt, batch.prompt)),
        (data.responses, batch.responses, batch.response_names, (data.response_1, batch.response_1)),
    ):
        assert names is not None
        assert len(vectors) == len(names) == len(table), "as many rows as can be named, and each of them once"
        assert torch.equal(vectors, table.take(names))
        assert torch.equal(names[references[1]], references[0][rows])


def test_large_tables_are_taken_row_by_row(tmp_path: Path) -> None:
    """Where a batch is a small share of the table, finding repeats would cost more than it saves."""
    vectors = (np.arange(900 * 3).reshape(900, 3) / 8).astype(np.float32)
    rows = random_rows(700, prompts=900, responses=900)
    cache = make_cache(tmp_path / "cache", rows, known_vectors(vectors, vectors))
    data = load_preferences(cache, cache.comparisons("table"), device="cpu")
    batch = data.batch(torch.tensor([1, 1, 2]))
    assert (len(batch.prompts), len(batch.responses)) == (3, 6)
    for at, row in enumerate(rows[i] for i in (1, 1, 2)):
        number = int(str(row["response_2"]).split()[1])
        assert batch.responses[batch.response_2[at]].tolist() == vectors[number].tolist()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, N + 3), rows=st.lists(st.integers(0, N - 1), max_size=20))
def test_batches_are_all_comparisons_in_order(cache: Cache, size: int, rows: list[int]) -> None:
    data = load_preferences(cache, cache.comparisons("table"), device="cpu").take(np.array(rows, np.int64))
    batches = list(data.batches(size))
    assert all(len(batch.y) <= size for batch in batches)
    expected = [random_rows()[row] for row in rows]
    assert [data.users[user] for batch in batches for user in batch.user.tolist()] == [r["user_id"] for r in expected]
    assert [y for batch in batches for y in batch.y.tolist()] == [row["y"] for row in expected]


def test_streamed_and_resident_data_are_the_same(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = load_preferences(cache, cache.comparisons("table"), device="cpu")
    monkeypatch.setattr(tensors, "MEMORY_SHARE", 0)
    streamed = load_preferences(cache, cache.comparisons("table"), device="cpu")
    assert (resident.streamed, streamed.streamed) == (False, True)
    for first, second in zip(resident.batches(10), streamed.batches(10), strict=True):
        for name in (field.name for field in dataclasses.fields(first) if field.name != "comparison"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_stored_type_comes_back_as_float32(tmp_path: Path, encoder: KnownVectors, dtype: StoredDtype) -> None:
    cache = make_cache(tmp_path / "cache", random_rows(), encoder, dtype=dtype)
    data = load_preferences(cache, cache.comparisons("table"), device="cpu")
    first = encoder.vectors["prompt", str(random_rows()[0]["prompt"])]
    assert data.batch(torch.tensor([0])).prompts[0].tolist() == first.tolist()


def test_users_are_renumbered_by_id(cache: Cache) -> None:
    data = load_preferences(cache, cache.comparisons("table"), device="cpu")
    ids = [data.users[user] for user in data.user.tolist()]
    moved = data.with_users(["someone", "user 2", "user 0", "user 1"])
    assert moved.users == ("someone", "user 2", "user 0", "user 1")
    assert [moved.users[u] if u >= 0 else "user 3" for u in moved.user.tolist()] == ids
    assert -1 in moved.user.tolist()
    back = moved.with_users(data.users)
    assert [data.users[u] if u >= 0 else "user 3" for u in back.user.tolist()] == ids  # the unknown stay unknown


def test_take_shares_the_vectors(cache: Cache) -> None:
    data = load_preferences(cache, cache.comparisons("table"), device="cpu")
    part = data.take(np.array([7, 2]))
    assert len(part) == 2
    assert part.prompts is data.prompts
    assert part.y.tolist() == data.y[[7, 2]].tolist()


def test_an_empty_part_has_empty_batches(cache: Cache) -> None:
    none = load_preferences(cache, cache.comparisons("table"), device="cpu").take(np.empty(0, np.int64))
    assert [len(batch.y) for batch in none.batches(4)] in ([], [0])


def test_ties_are_kept(tmp_path: Path, encoder: KnownVectors) -> None:
    cache = make_cache(tmp_path / "cache", random_rows(), encoder)
    stored = cache.comparisons("table")
    y = stored.comparisons.y.copy()
    y[4] = 0
    tied = dataclasses.replace(stored, comparisons=dataclasses.replace(stored.comparisons, y=y))
    assert load_preferences(cache, tied, device="cpu").y.tolist() == y.tolist()


def test_texts_that_the_cache_lacks_are_refused(cache: Cache, tmp_path: Path, encoder: KnownVectors) -> None:
    rows = random_rows()
    small = make_cache(tmp_path / "small", rows[:3], encoder)
    spaces = small.comparisons().spaces
    everything = cache.comparisons("table")
    stored = StoredComparisons("all", everything.comparisons, everything.fingerprint, spaces, {})
    with pytest.raises(
        MismatchError, match=r"of 5 prompts of the table all have no vector in .*small \(the first has the"
    ):
        load_preferences(small, stored, device="cpu")


def test_an_unknown_space_or_device_is_refused(cache: Cache) -> None:
    with pytest.raises(InputError, match="choose one with --space"):
        load_preferences(cache, cache.comparisons("table"), space="nothing", device="cpu")
    with pytest.raises(InputError, match="expected auto, cpu, cuda"):
        load_preferences(cache, cache.comparisons("table"), device="abacus")


def test_one_of_two_encoders_is_chosen_by_its_model(tmp_path: Path, encoder: KnownVectors) -> None:
    path, rows = tmp_path / "cache", random_rows()
    other = KnownVectors({key: 2 * value for key, value in encoder.vectors.items()}, D, "double")
    make_cache(path, rows, encoder)
    cache = make_cache(path, rows, other)
    with pytest.raises(InputError, match=r"2 encoders .*choose one with --space"):
        load_preferences(cache, cache.comparisons("table"), device="cpu")
    once, twice = (
        load_preferences(cache, cache.comparisons("table"), space=name, device="cpu").batch(torch.arange(N)).prompts
        for name in ("known", "double")
    )
    assert torch.equal(2 * once, twice)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_vector_that_is_not_finite_is_refused(
    tmp_path: Path, encoder: KnownVectors, monkeypatch: pytest.MonkeyPatch, *, streamed: bool
) -> None:
    cache = make_cache(tmp_path / "cache", random_rows(), encoder)
    space_id = cache.comparisons("table").spaces[0][1]
    path = cache.space(space_id).shards[0].path
    content = path.read_bytes()
    damaged = encoder.vectors["response", "response 3"].tobytes()
    assert content.count(damaged) == 1
    path.write_bytes(content.replace(damaged, np.full(D, np.inf, np.float32).tobytes()))
    if streamed:
        monkeypatch.setattr(tensors, "MEMORY_SHARE", 0)
    with pytest.raises(
        NumericsError, match=rf"The vector of row \d+ in the response space {space_id[:8]} is not finite"
    ):
        list(load_preferences(cache, cache.comparisons("table"), device="cpu").batches(5))


def test_a_table_of_vectors_says_how_many_it_has(cache: Cache) -> None:
    space = cache.space(cache.comparisons("table").spaces[0][0])
    table = VectorTable(space, np.array([2, 0, 1]), torch.device("cpu"), resident=True)
    assert len(table) == 3
    assert torch.equal(table.take(torch.tensor([1])), space.rows(np.array([0])).float())
