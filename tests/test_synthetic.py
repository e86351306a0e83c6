"""The synthetic populations are reproducible, balanced, and true to the tastes planted in them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from palcache.errors import PalcacheError
from palcache.sentences import TOPICS
from palcache.synthetic import (
    GROUPS,
    PlantedComparisons,
    Population,
    Row,
    draw_population,
    population_comparisons,
    sample_comparisons,
    sample_rows,
    write_new_users,
    write_sample,
)

SAMPLE = Path(__file__).parents[1] / "data" / "sample.jsonl"
TASTES = {response.text: response.taste for topic in TOPICS for response in topic.responses}
USERS, K, D, P, PROMPTS, RESPONSES, PER_USER, TEMPERATURE = 11, 3, 7, 5, 13, 17, 900, 0.4


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Return the rows of the committed sample."""
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def population() -> Population:
    """Return a population whose dimensions all differ."""
    return draw_population(seed=3, users=USERS, k=K, d=D, p=P)


@pytest.fixture(scope="module")
def planted(population: Population) -> PlantedComparisons:
    """Return the answers of `population`."""
    return population_comparisons(
        population, seed=4, prompts=PROMPTS, responses=RESPONSES, per_user=PER_USER, temperature=TEMPERATURE
    )


def true_answer(row: Row) -> int:
    """Return y as the row's group would answer without noise."""
    order = {"careless": 0, row["group"]: 2}
    left, right = (order.get(TASTES[str(row[side])], 1) for side in ("response_1", "response_2"))
    assert left != right
    return 1 if right > left else -1


def flipped_share(rows: list[Row]) -> float:
    """Return the share of rows whose answer is not the true one."""
    return float(np.mean([row["y"] != true_answer(row) for row in rows]))


def longer_accuracy(rows: list[Row]) -> float:
    """Return the accuracy of the rule that the longer response wins; equal lengths count one half."""
    margins = np.array([len(str(row["response_2"])) - len(str(row["response_1"])) for row in rows])
    y = np.array([row["y"] for row in rows])
    return float(np.mean(np.where(margins == 0, 0.5, np.sign(margins) == y)))


def worst_z(planted: PlantedComparisons, probabilities: npt.NDArray[np.float64]) -> float:
    """Return the largest deviation of the answers from `probabilities`, in standard errors, over ten equal bins."""
    scores = []
    for rows in np.array_split(np.argsort(probabilities), 10):
        p = probabilities[rows]
        scores.append(abs((planted.y[rows] == 1).sum() - p.sum()) / np.sqrt((p * (1 - p)).sum()))
    return float(max(scores))


def assert_equal_fields(first: object, second: object) -> None:
    """Assert that two dataclasses hold the same arrays of the same types."""
    for field in dataclasses.fields(first):  # type: ignore[arg-type]
        left, right = getattr(first, field.name), getattr(second, field.name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, err_msg=field.name)


def test_topics_have_the_promised_shape() -> None:
    """Each topic has three adventurous, three homely and two careless replies, and no text occurs twice."""
    assert len({topic.prompt for topic in TOPICS}) == len(TOPICS) == 24
    for topic in TOPICS:
        assert Counter(response.taste for response in topic.responses) == {"adventurous": 3, "homely": 3, "careless": 2}
    assert len(TASTES) == 8 * len(TOPICS), "a text occurs twice"


def test_no_format_tells_the_taste() -> None:
    """Every reply is one plain sentence of 8 to 25 words, without quotes or brackets."""
    for text in TASTES:
        assert text[0].isupper()
        assert text.endswith(".")
        assert text.count(".") == 1
        assert not set(text) & set("\"'()[]:;!?\n")
        assert text == text.strip()
        assert 8 <= len(text.split()) <= 25


def test_committed_sample_regenerates_byte_for_byte(tmp_path: Path) -> None:
    """The file in `data/` is what the library writes, and nothing else is left behind."""
    write_sample(tmp_path / "sample.jsonl")
    content = (tmp_path / "sample.jsonl").read_bytes()
    assert content == SAMPLE.read_bytes()
    assert content.endswith(b"\n")
    assert b"\r" not in content
    assert [path.name for path in tmp_path.iterdir()] == ["sample.jsonl"], "a temporary file is left"


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk leaves the file as it was, and no temporary file."""
    path = tmp_path / "sample.jsonl"
    path.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="the disk is gone"):
        write_sample(path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("sample.jsonl", b"old")]


def test_committed_new_users_regenerate_byte_for_byte(tmp_path: Path, rows: list[Row]) -> None:
    """They are of the same groups and pairs, and none of them is in the sample."""
    write_new_users(tmp_path / "new_users.jsonl")
    content = (tmp_path / "new_users.jsonl").read_bytes()
    assert content == SAMPLE.with_name("new_users.jsonl").read_bytes()
    new = [json.loads(line) for line in content.splitlines()]
    assert sorted({row["user_id"] for row in new}) == [
        f"{group}-{number:02d}" for group in ("adventurous", "homely") for number in range(8, 12)
    ]
    assert not {row["user_id"] for row in new} & {row["user_id"] for row in rows}
    assert {row["pair_id"] for row in new} <= {row["pair_id"] for row in sample_rows(1, 1, 504)}


def test_sample_has_the_promised_users_and_pairs(rows: list[Row]) -> None:
    """There are two groups of eight users, each with 60 different pairs."""
    assert len(rows) == 16 * 60
    assert {(row["user_id"], row["group"]) for row in rows} == {
        (f"{group}-{number:02d}", group) for group in GROUPS for number in range(8)
    }
    assert set(Counter(row["user_id"] for row in rows).values()) == {60}
    assert len({(row["user_id"], row["pair_id"]) for row in rows}) == len(rows), "a user sees a pair twice"


def test_pair_id_names_the_pair_whichever_way_round(rows: list[Row]) -> None:
    """One pair_id stands for one prompt with one set of two texts, and conversely."""
    pairs = {(row["pair_id"], row["prompt"], frozenset({row["response_1"], row["response_2"]})) for row in rows}
    assert len(pairs) == len({row["pair_id"] for row in rows}) == len({texts for _, _, texts in pairs})


def test_sides_are_balanced(rows: list[Row]) -> None:
    """The label cannot be read off the side, in neither group."""
    for group in GROUPS:
        y = np.array([row["y"] for row in rows if row["group"] == group])
        assert set(y.tolist()) == {-1, 1}
        assert abs(y.mean()) < 3 / np.sqrt(len(y))


@pytest.mark.parametrize("group", GROUPS)
def test_length_does_not_tell_the_answer(rows: list[Row], group: str) -> None:
    """The rule that the longer response wins is near chance, overall and in each group."""
    assert 0.4 < longer_accuracy(rows) < 0.6
    assert 0.35 < longer_accuracy([row for row in rows if row["group"] == group]) < 0.65


def test_groups_disagree_about_half_of_the_time(rows: list[Row]) -> None:
    """One taste for all cannot explain the sample: most pairs are contested, not all."""
    contested = [
        row for row in rows if "careless" not in (TASTES[str(row["response_1"])], TASTES[str(row["response_2"])])
    ]
    assert 0.5 < len(contested) / len(rows) < 0.7


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3, 1.0])
def test_flips_are_near_the_noise(noise: float) -> None:
    """The share of answers against the user's taste is the noise, within four standard errors."""
    drawn = sample_rows(seed=5, users_per_group=9, comparisons_per_user=70, noise=noise)
    assert abs(flipped_share(drawn) - noise) <= 4 * np.sqrt(noise * (1 - noise) / len(drawn))


def test_sample_table_holds_the_rows() -> None:
    """The table has the rows' users, answers, groups and pairs, in their order."""
    table, drawn = sample_comparisons(6, 2, 5), sample_rows(6, 2, 5)
    assert len(table) == len(drawn) == 2 * 2 * 5
    assert table.users.to_list() == [row["user_id"] for row in drawn]
    assert table.y.tolist() == [row["y"] for row in drawn]
    assert table.group is not None
    assert table.group.to_list() == [row["group"] for row in drawn]
    assert table.pair_id is not None
    assert table.pair_id.to_list() == [row["pair_id"] for row in drawn]


def test_sample_follows_its_seed() -> None:
    """The same seed draws the same rows, another seed others."""
    assert sample_rows(seed=7) == sample_rows(seed=7)
    assert sample_rows(seed=7) != sample_rows(seed=8)


def test_sample_can_use_every_pair() -> None:
    """A user can be asked all 504 pairs, and names stay of one width beyond 100 users."""
    drawn = sample_rows(users_per_group=101, comparisons_per_user=504)[:504]
    assert len({row["pair_id"] for row in drawn}) == 504
    assert drawn[0]["user_id"] == "adventurous-000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"seed = -1; expected a non-negative integer"),
        ({"users_per_group": 0}, r"users_per_group = 0; expected at least 1"),
        ({"comparisons_per_user": 0}, r"comparisons_per_user = 0; expected at least 1"),
        ({"comparisons_per_user": 505}, r"comparisons_per_user = 505; expected at most 504"),
        ({"noise": 1.5}, r"noise = 1.5; expected a probability"),
        ({"noise": float("nan")}, r"noise = nan; expected a probability"),
    ],
)
def test_sample_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    """Each argument out of its range is named with what was expected."""
    with pytest.raises(PalcacheError, match=message):
        sample_comparisons(**arguments)


def test_population_has_the_promised_shapes(population: Population) -> None:
    """Maps and mixtures have their documented shapes."""
    assert population.item_map.shape == (P, D)
    assert population.prompt_maps.shape == (K, P, D)
    assert population.mixtures.shape == (USERS, K)


def test_mixtures_are_on_the_simplex(population: Population) -> None:
    """Weights are non-negative and sum to one."""
    assert (population.mixtures >= 0).all()
    np.testing.assert_allclose(population.mixtures.sum(axis=1), 1, rtol=1e-12)


def test_concentration_orders_the_mixtures() -> None:
    """A small concentration gives nearly pure users, a large one nearly equal weights."""
    largest = [
        draw_population(seed=9, users=400, k=K, d=2, p=1, concentration=value).mixtures.max(axis=1).mean()
        for value in (0.01, 1.0, 1000.0)
    ]
    assert largest[0] > 0.95
    assert 0.95 > largest[1] > 0.45
    assert largest[2] < 0.4


def test_planted_comparisons_have_the_promised_shapes_and_types(planted: PlantedComparisons) -> None:
    """Every array has its documented shape, type and range, and no response meets itself."""
    n = USERS * PER_USER
    assert len(planted) == n
    assert (planted.prompt_vectors.shape, planted.response_vectors.shape) == ((PROMPTS, D), (RESPONSES, D))
    assert planted.prompt_vectors.dtype == planted.response_vectors.dtype == np.float32
    for name, size in (("user", USERS), ("prompt", PROMPTS), ("response_1", RESPONSES), ("response_2", RESPONSES)):
        indices = getattr(planted, name)
        assert (indices.shape, indices.dtype) == ((n,), np.int32)
        assert set(indices.tolist()) == set(range(size)), name
    assert planted.y.dtype == np.int8
    assert set(planted.y.tolist()) == {-1, 1}
    assert (planted.response_1 != planted.response_2).all()
    assert (np.bincount(planted.user) == PER_USER).all()


def test_planted_vectors_have_norm_one(planted: PlantedComparisons) -> None:
    """Prompts and responses are unit vectors to float32 precision."""
    for vectors in (planted.prompt_vectors, planted.response_vectors):
        np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("row", [0, 1, 4321, USERS * PER_USER - 1])
def test_margins_are_differences_of_cosines(population: Population, planted: PlantedComparisons, row: int) -> None:
    """Margins and probabilities agree with the formulas of PAL-B, written out for one row."""
    prompt = planted.prompt_vectors[planted.prompt[row]].astype(np.float64)
    ideal = np.zeros(P)
    for weight, prototype in zip(population.mixtures[planted.user[row]], population.prompt_maps, strict=True):
        ideal += weight * (prototype @ prompt)
    cosines = []
    for index in (planted.response_1[row], planted.response_2[row]):
        item = population.item_map @ planted.response_vectors[index].astype(np.float64)
        cosines.append(item @ ideal / (np.linalg.norm(item) * np.linalg.norm(ideal)))
    assert planted.margins[row] == pytest.approx(cosines[1] - cosines[0], rel=1e-10)
    assert planted.probabilities[row] == pytest.approx(1 / (1 + np.exp(-planted.margins[row] / TEMPERATURE)), rel=1e-10)


def test_answers_follow_the_true_probability(planted: PlantedComparisons) -> None:
    """Answers come as often as promised; a wrong temperature or the wrong side would be noticed."""
    assert worst_z(planted, planted.probabilities) < 4
    hotter = 1 / (1 + np.exp(-planted.margins / (1.5 * TEMPERATURE)))
    assert worst_z(planted, hotter) > 5, "the test cannot tell a wrong temperature"
    assert worst_z(planted, 1 - planted.probabilities) > 20, "the test cannot tell the sides"


def test_margins_do_not_depend_on_the_block(
    population: Population, planted: PlantedComparisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Working in blocks changes no margin."""
    monkeypatch.setattr("palcache.synthetic._BLOCK", 1234)
    again = population_comparisons(
        population, seed=4, prompts=PROMPTS, responses=RESPONSES, per_user=PER_USER, temperature=TEMPERATURE
    )
    np.testing.assert_allclose(again.margins, planted.margins, rtol=0, atol=1e-13)


def test_planted_worlds_follow_their_seeds(population: Population) -> None:
    """The same seed gives the same arrays, another seed others."""

    def ask(seed: int) -> PlantedComparisons:
        return population_comparisons(population, seed=seed, prompts=2, responses=3, per_user=4, temperature=1.0)

    assert_equal_fields(draw_population(seed=3, users=USERS, k=K, d=D, p=P), population)
    assert (draw_population(seed=2, users=USERS, k=K, d=D, p=P).mixtures != population.mixtures).all()
    assert_equal_fields(ask(5), ask(5))
    assert (ask(5).margins != ask(6).margins).all()


def test_one_seed_for_both_draws_does_not_repeat_numbers(population: Population) -> None:
    """With one seed for both, the prompts are not the rows of the item map."""
    asked = population_comparisons(population, seed=3, prompts=P, responses=2, per_user=1, temperature=1.0)
    rows = population.item_map / np.linalg.norm(population.item_map, axis=1, keepdims=True)
    assert not np.isclose(asked.prompt_vectors, rows, atol=1e-6).any()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("seed", -1, "seed = -1; expected a non-negative"),
        ("users", 0, "users = 0; expected at least 1"),
        ("k", 0, "k = 0; expected at least 1"),
        ("d", 0, "d = 0; expected at least 1"),
        ("p", -5, "p = -5; expected at least 1"),
        ("concentration", 0.0, "concentration = 0.0; expected a positive number"),
        ("concentration", float("inf"), "concentration = inf; expected a positive number"),
    ],
)
def test_population_refuses_bad_arguments(argument: str, value: float, message: str) -> None:
    """Each argument out of its range is named with what was expected."""
    arguments: dict[str, Any] = {"seed": 0, "users": 2, "k": 3, "d": 4, "p": 5} | {argument: value}
    with pytest.raises(PalcacheError, match=message):
        draw_population(**arguments)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("seed", -2, "seed = -2; expected a non-negative"),
        ("prompts", 0, "prompts = 0; expected at least 1"),
        ("responses", 1, "responses = 1; expected at least 2"),
        ("per_user", 0, "per_user = 0; expected at least 1"),
        ("temperature", 0.0, "temperature = 0.0; expected a positive number"),
        ("temperature", float("nan"), "temperature = nan; expected a positive number"),
    ],
)
def test_comparisons_refuse_bad_arguments(population: Population, argument: str, value: float, message: str) -> None:
    """Each argument out of its range is named with what was expected."""
    arguments: dict[str, Any] = {"seed": 0, "prompts": 2, "responses": 3, "per_user": 4, "temperature": 1.0}
    with pytest.raises(PalcacheError, match=message):
        population_comparisons(population, **(arguments | {argument: value}))
