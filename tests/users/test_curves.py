"""The protocol of learning curves: one query for all, support drawn anew, and who is left out is counted."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from palcache.comparisons import Column
from palcache.errors import InputError
from palcache.users.adaptation import Population
from palcache.users.curves import curve_csv, curve_to_dict, divide, learning_curve
from tests.planted import planted, reduced_of, standard_prior, table_of

USERS, PER_USER, K = 30, 12, 3


@pytest.fixture(scope="module")
def planted_curve() -> tuple[object, ...]:
    population, answers = planted(users=USERS, k=K, per_user=PER_USER, seed=7, variance=3.0)
    seen, _ = planted(users=20, k=K, per_user=1, seed=70, variance=3.0)
    table = table_of(answers)
    reduced = reduced_of(population, answers)
    return reduced, table, Population(torch.from_numpy(seen.mixtures), standard_prior(K, 3.0))


def test_query_and_support_are_drawn_per_user(planted_curve: tuple[object, ...]) -> None:
    table = planted_curve[1]
    support, query = divide(table, seed=1)  # type: ignore[arg-type]
    users = table.users.codes  # type: ignore[attr-defined]
    assert (support ^ query).all()
    assert np.bincount(users[query]).tolist() == [6] * USERS
    again = divide(table, seed=1)[1]  # type: ignore[arg-type]
    assert (query == again).all()
    assert (query != divide(table, seed=2)[1]).any()  # type: ignore[arg-type]


def test_split_column_is_honoured() -> None:
    _, answers = planted(users=2, k=K, per_user=3)
    table = table_of(answers, split=["support", "query", "query", "support", "support", "query"])
    support, query = divide(table)
    assert support.tolist() == [True, False, False, True, True, False]
    assert query.tolist() == [False, True, True, False, False, True]
    ours = table.with_split(Column.of(["train", "val", "test"] * 2))
    assert divide(ours)[1].sum() == 4  # train, val and test say nothing about support and query
    with pytest.raises(InputError, match="The split column has support, train and no query; give both"):
        divide(table.with_split(Column.of(["support", "train"] * 3)))


def test_curve_rises_from_the_populations_mixture(planted_curve: tuple[object, ...]) -> None:
    reduced, table, population = planted_curve
    points = learning_curve(reduced, table, population, shots=(0, 1, 6, 7), draws=3)  # type: ignore[arg-type]
    assert [point.shots for point in points] == [0, 1, 6]  # nobody has 7 support comparisons
    assert [point.left_out for point in points] == [0, 0, 0]
    _, query = divide(table)  # type: ignore[arg-type]
    margins = reduced.margins(population.generic.expand(USERS, -1)).numpy()  # type: ignore[attr-defined]
    expected = float((np.sign(margins) == table.y)[query].mean())  # type: ignore[attr-defined]
    assert points[0].evaluation.accuracy["micro"].value == pytest.approx(expected)
    assert points[0].gain.value == 0
    assert points[2].gain.value > 0
    assert points[2].gain.low < points[2].gain.value < points[2].gain.high
    values = curve_to_dict(points)
    assert set(values) == {"0", "1", "6"}
    assert {"micro", "macro", "interval"} <= set(values["6"]["accuracy"])
    assert values["6"]["users"] == USERS
    rows = list(csv.DictReader(io.StringIO(curve_csv(points).decode())))
    assert [row["shots"] for row in rows] == ["0", "1", "6"]
    assert float(rows[2]["micro"]) == points[2].evaluation.accuracy["micro"].value


def test_users_with_too_few_comparisons_are_left_out_and_counted(planted_curve: tuple[object, ...]) -> None:
    reduced, table, population = planted_curve
    rows = np.flatnonzero((np.arange(USERS * PER_USER) % PER_USER < 4) | (table.users.codes < 10))  # type: ignore[attr-defined]
    part = reduced.take(torch.from_numpy(rows))  # type: ignore[attr-defined]
    points = learning_curve(part, table.take(rows), population, shots=(0, 2, 5))  # type: ignore[arg-type,attr-defined]
    assert [(point.shots, point.evaluation.users, point.left_out) for point in points] == [
        (0, 30, 0),
        (2, 30, 0),
        (5, 10, 20),
    ]


def test_majority_and_minority(planted_curve: tuple[object, ...]) -> None:
    reduced, table, population = planted_curve
    names = ["many" if code < 20 else "few" for code in table.users.codes]  # type: ignore[attr-defined]
    grouped = replace(table, group=Column.of(names))  # type: ignore[type-var]
    point = learning_curve(reduced, grouped, population, shots=(2,))[0]  # type: ignore[arg-type]
    assert point.majority == point.evaluation.groups["many"]
    assert point.minority == point.evaluation.groups["few"]
    assert point.to_dict()["majority"] == point.majority


def test_same_seed_same_curve(planted_curve: tuple[object, ...]) -> None:
    first, second = (learning_curve(*planted_curve, shots=(0, 2, 5), seed=4) for _ in range(2))  # type: ignore[arg-type]
    assert first == second


def test_bad_numbers_are_refused(planted_curve: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match="expected numbers from 0 and at least one draw"):
        learning_curve(*planted_curve, shots=(-1, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Got shots \(1,\) and 0 draws"):
        learning_curve(*planted_curve, shots=(1,), draws=0)  # type: ignore[arg-type]
