"""Training finds planted tastes, stops where it should, says where a loss breaks, and resumes to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palcache import fits, tensors
from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig
from palcache.errors import InputError, NumericsError
from palcache.heads import PalB, Parameters
from palcache.tensors import PairBatch, PreferenceData, VectorTable, load_preferences
from palcache.training import FitProgress, FitResult, FitState, epoch_order, fit, order_seed, validate
from tests.worlds import PLANTED_FIT, PLANTED_HEAD, make_cache, planted_rows, splits_of

QUICK = FitConfig(batch_size=32, epochs=4, evaluations=6, lr=0.01, patience=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a planted world: 7 users, 3 prototypes, width 10, preference space 6, 60 comparisons each."""
    return make_cache(tmp_path_factory.mktemp("planted") / "cache", *planted_rows())


@pytest.fixture(scope="module")
def data(cache: Cache) -> dict[str, PreferenceData]:
    """Return its splits."""
    return splits_of(cache)


@pytest.fixture(scope="module")
def shape(data: dict[str, PreferenceData]) -> PalB:
    """Return a head with dropout that fits it."""
    train = data["train"]
    return PalB.from_config(HeadConfig(k=2, p=4, projector="mlp1-relu-dropout1"), d=train.width, users=len(train.users))


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def run(shape: PalB, data: Mapping[str, PreferenceData], config: FitConfig, **options: Any) -> FitResult:
    return fit(shape, data["train"], data["val"], config, **options)


def test_planted_tastes_are_found_by_as_many_prototypes_and_not_by_one(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", *planted_rows(users=20, per_user=250))
    data = splits_of(cache)
    accuracy = {}
    for k in (1, 3):
        shape = PalB.from_config(replace(PLANTED_HEAD, k=k), d=10, users=20)
        result = run(shape, data, PLANTED_FIT)
        accuracy[k] = validate(shape, result.parameters, data["test"])[1]
    assert accuracy[3] > 0.89
    assert accuracy[3] > accuracy[1] + 0.15


def test_the_same_seed_gives_the_same_parameters_and_another_does_not(
    shape: PalB, data: dict[str, PreferenceData]
) -> None:
    first, second = run(shape, data, QUICK), run(shape, data, QUICK)
    assert same(first.parameters, second.parameters)
    assert (first.history, first.best_step) == (second.history, second.best_step)
    other = run(shape, data, replace(QUICK, seed=1))
    assert not same(first.parameters, other.parameters)


def test_global_randomness_plays_no_part(shape: PalB, data: dict[str, PreferenceData]) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(shape, data, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first.parameters, run(shape, data, QUICK).parameters)


def test_a_stop_at_any_evaluation_changes_nothing(shape: PalB, data: dict[str, PreferenceData]) -> None:
    states: list[FitState] = []
    whole = run(shape, data, QUICK, on_state=states.append)
    assert len(states) == 6
    for state in states:
        again = run(shape, data, QUICK, state=state)
        assert same(again.parameters, whole.parameters), state.step
        assert (again.history, again.best_step) == (whole.history, whole.best_step)


def test_each_epoch_takes_every_comparison_once_in_an_order_of_its_own(
    shape: PalB, data: dict[str, PreferenceData], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[int]] = []
    batch = PreferenceData.batch

    def watched(self: PreferenceData, rows: torch.Tensor) -> PairBatch:
        if self is data["train"]:
            taken.append(rows.tolist())
        return batch(self, rows)

    monkeypatch.setattr(PreferenceData, "batch", watched)
    run(shape, data, replace(QUICK, epochs=3, evaluations=7))
    n, steps = len(data["train"]), -(-len(data["train"]) // QUICK.batch_size)
    assert len(taken) == 3 * steps
    assert {len(rows) for rows in taken} <= {n // steps, n // steps + 1}  # no small last batch
    orders = [[row for rows in taken[at : at + steps] for row in rows] for at in range(0, 3 * steps, steps)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_a_state_is_not_changed_by_going_on_from_it(shape: PalB, data: dict[str, PreferenceData]) -> None:
    states: list[FitState] = []
    run(shape, data, QUICK, on_state=states.append)
    before = {name: value.clone() for name, value in (states[1].parameters | states[1].moments).items()}
    run(shape, data, QUICK, state=states[1])
    assert same(before, states[1].parameters | states[1].moments)


def test_the_parameters_are_those_of_the_lowest_validation_loss(shape: PalB, data: dict[str, PreferenceData]) -> None:
    result = run(shape, data, replace(QUICK, epochs=40, evaluations=25, lr=0.05))
    best = min(result.history, key=lambda row: row.val_loss)
    assert result.best_step == best.step < result.history[-1].step
    assert validate(shape, result.parameters, data["val"]) == (best.val_loss, best.val_accuracy)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_for_lack_of_progress(shape: PalB, data: dict[str, PreferenceData], patience: int) -> None:
    config = replace(QUICK, epochs=60, evaluations=60, lr=0.05, patience=patience)
    result = run(shape, data, config)
    losses = [row.val_loss for row in result.history]
    assert result.stopped_early
    assert len(losses) - 1 - losses.index(min(losses)) == patience
    assert len(losses) < 60
    again = run(shape, data, config, state=last_state(shape, data, config))
    assert (again.history, again.stopped_early) == (result.history, True)


def last_state(shape: PalB, data: Mapping[str, PreferenceData], config: FitConfig) -> FitState:
    states: list[FitState] = []
    run(shape, data, config, on_state=states.append)
    return states[-1]


def test_without_patience_training_never_stops_early(shape: PalB, data: dict[str, PreferenceData]) -> None:
    result = run(shape, data, replace(QUICK, epochs=20, evaluations=30, lr=0.05))
    assert len(result.history) == 30
    assert not result.stopped_early


@pytest.mark.parametrize(
    ("batch", "epochs", "asked", "made"),
    [(32, 4, 6, 6), (32, 4, 1, 1), (500, 3, 20, 3), (50, 5, 7, 7), (32, 3, 20, 20)],
)
def test_validation_is_measured_evenly_and_at_the_end(
    shape: PalB, data: dict[str, PreferenceData], batch: int, epochs: int, asked: int, made: int
) -> None:
    result = run(shape, data, replace(QUICK, batch_size=batch, epochs=epochs, evaluations=asked))
    steps = epochs * -(-len(data["train"]) // batch)
    found = [row.step for row in result.history]
    assert len(found) == made
    assert found[-1] == steps
    gaps = np.diff([0, *found])
    assert gaps.max() - gaps.min() <= 1
    assert result.history[-1].epoch == epochs


def test_epochs_follow_the_size_of_the_table(shape: PalB, data: dict[str, PreferenceData]) -> None:
    result = run(shape, data, FitConfig(batch_size=200, evaluations=1))
    assert result.history[-1].step == 600


def test_the_learning_rate_rises_and_falls(shape: PalB, data: dict[str, PreferenceData]) -> None:
    steps = 4 * -(-len(data["train"]) // 32)
    result = run(shape, data, replace(QUICK, evaluations=steps, warmup=0.25))
    rates = np.array([row.lr for row in result.history]) / QUICK.lr
    at = np.arange(steps)
    expected = np.minimum(1, (at + 1) / (0.25 * steps)) * (1 + np.cos(np.pi * at / steps)) / 2
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize("frozen", ["lr", "lr_users", "lr_scale"])
def test_each_group_has_its_learning_rate(shape: PalB, data: dict[str, PreferenceData], frozen: str) -> None:
    result = run(shape, data, replace(QUICK, **{frozen: 0.0}))  # type: ignore[arg-type]
    start = shape.initial(torch.Generator().manual_seed(QUICK.seed))
    group = {"user.logits": "lr_users", "logit_scale": "lr_scale"}
    for name, value in result.parameters.items():
        assert torch.equal(value, start[name]) == (group.get(name, "lr") == frozen), name


def test_only_projectors_decay(shape: PalB, data: dict[str, PreferenceData]) -> None:
    plain, decayed = (run(shape, data, replace(QUICK, epochs=1, evaluations=1, weight_decay=w)) for w in (0.0, 30.0))
    for name in ("f.0.weight", "g.1.weight"):
        assert decayed.parameters[name].norm() < 0.9 * plain.parameters[name].norm()
    assert float(decayed.parameters["logit_scale"]) == pytest.approx(float(plain.parameters["logit_scale"]), abs=0.1)


def test_the_first_step_is_adamw_on_the_mean_loss(shape: PalB, data: dict[str, PreferenceData]) -> None:
    """One step over all comparisons without dropout, against AdamW's formula in float64."""
    head = replace(shape, projector="mlp1-relu-dropout0")
    train = data["train"]
    config = FitConfig(batch_size=len(train), epochs=1, evaluations=1, warmup=0.0, weight_decay=0.1)
    found = run(head, data, config).parameters
    start = {n: v.double().requires_grad_() for n, v in head.initial(torch.Generator().manual_seed(0)).items()}
    batch = train.batch(torch.arange(len(train)))
    batch = replace(batch, prompts=batch.prompts.double(), responses=batch.responses.double(), y=batch.y.double())
    margins = head.margins(start, batch)
    torch.nn.functional.binary_cross_entropy_with_logits(margins, (batch.y + 1) / 2).backward()  # type: ignore[no-untyped-call]
    rates = {"user.logits": (config.lr_users, 0.0), "logit_scale": (config.lr_scale, 0.0)}
    for name, value in start.items():
        lr, decay = rates.get(name, (config.lr, config.weight_decay))
        assert value.grad is not None
        gradient = value.grad
        expected = value.detach() * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        sure = gradient.abs() > 1e-6  # near zero the sign of float32 is noise
        torch.testing.assert_close(found[name].double()[sure], expected[sure], rtol=1e-4, atol=1e-6)


def test_validation_is_the_mean_loss_with_half_for_ties_and_the_mean_mixture_for_strangers(
    shape: PalB, data: dict[str, PreferenceData]
) -> None:
    generator = torch.Generator().manual_seed(3)
    parameters = {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in shape.initial(generator).items()}
    val = data["val"]
    val = replace(val, y=torch.where(torch.arange(len(val)) % 5 == 0, 0.0, val.y)).with_users(
        [user for user in val.users if user != "user 3"]
    )
    val = replace(val, users=data["val"].users)
    assert (val.user == -1).any()
    mixtures = shape.mixtures(parameters)
    own = torch.where(val.user[:, None] >= 0, mixtures[val.user], mixtures.mean(0))
    margins = shape.margins(parameters, val.batch(torch.arange(len(val))), mixtures=own).double().numpy()
    y = val.y.numpy()
    right = np.where(y * margins == 0, 0.5, (np.sign(margins) == y).astype(float))
    losses = np.logaddexp(0, margins) - margins * (y + 1) / 2
    assert validate(shape, parameters, val) == pytest.approx((losses.mean(), right.mean()), rel=1e-5)


def test_progress_is_told_after_each_evaluation(shape: PalB, data: dict[str, PreferenceData]) -> None:
    events: list[FitProgress] = []
    order: list[str] = []

    def note(event: FitProgress) -> None:
        events.append(event)
        order.append("progress")

    result = run(
        shape, data, QUICK,
        on_progress=note,
        on_state=lambda _state: order.append("state"),
    )  # fmt: skip
    assert tuple(event.row for event in events) == result.history
    assert {event.steps for event in events} == {result.history[-1].step}
    assert order == ["state", "progress"] * 6
    assert {event.rule for event in events} == {"head"}


def test_the_rate_counts_comparisons_and_not_places_in_batches(
    shape: PalB, data: dict[str, PreferenceData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch larger than the table holds the table: at one second a segment, the rate is the table's size."""
    clock = iter(range(1_000))
    monkeypatch.setattr("palcache.training.time.perf_counter", lambda: float(next(clock)))
    events: list[FitProgress] = []
    run(shape, data, replace(QUICK, batch_size=4_000, epochs=3, evaluations=3), on_progress=events.append)
    assert [event.comparisons_per_second for event in events] == [pytest.approx(len(data["train"]))] * 3


@pytest.mark.parametrize("name", ["train", "val"])
def test_an_empty_split_is_refused(shape: PalB, data: dict[str, PreferenceData], name: str) -> None:
    empty = {**data, name: data[name].take(np.empty(0, np.int64))}
    what = {"train": "training", "val": "validation"}[name]
    with pytest.raises(InputError, match=f"There are no {what} comparisons"):
        run(shape, empty, QUICK)


def test_vectors_of_another_width_are_refused(shape: PalB, data: dict[str, PreferenceData]) -> None:
    with pytest.raises(InputError, match="training vectors have width 10; the head expects 11"):
        run(replace(shape, d=11), data, QUICK)


def test_users_that_are_not_the_heads_are_refused(shape: PalB, data: dict[str, PreferenceData]) -> None:
    with pytest.raises(InputError, match="training comparisons are numbered for 7 users, the head for 5"):
        run(replace(shape, users=5), data, QUICK)
    with pytest.raises(InputError, match="validation comparisons are numbered for 2 users, the head for 7"):
        run(shape, {**data, "val": data["val"].with_users(["user 1", "user 2"])}, QUICK)
    strangers = data["train"].with_users([f"user {i}" for i in (0, 1, 2, 3, 4, 5, 99)])
    with pytest.raises(InputError, match="of a user whom the head does not have"):
        run(shape, {**data, "train": strangers}, QUICK)


def poisoned(cache: Cache, row: int) -> PreferenceData:
    """Return training data in which one comparison's left response, and no other's, is not a number."""
    train = splits_of(cache)["train"]
    vectors = train.responses.take(torch.arange(len(train.responses)))
    at = len(vectors)
    table = load_preferences(cache, cache.comparisons(), device="cpu").responses
    assert isinstance(table, VectorTable)
    table._resident = torch.cat([vectors, torch.full((1, vectors.shape[1]), torch.nan)])
    table._rows = torch.arange(at + 1)
    left = train.response_1.clone()
    left[row] = at
    return replace(train, responses=table, response_1=left)


@pytest.mark.parametrize("row", [0, 123, 250])
def test_a_broken_loss_says_where_it_began(
    shape: PalB, cache: Cache, data: dict[str, PreferenceData], row: int
) -> None:
    """The comparison's place in the first epoch's order is the batch that the message must name."""
    train = poisoned(cache, row)
    order = epoch_order(len(train), order_seed(QUICK.seed, 0))
    parts = order.tensor_split(-(-len(train) // 32))
    batch = next(i for i, part in enumerate(parts) if row in part.tolist())
    with pytest.raises(
        NumericsError,
        match=rf"^The loss is nan at step {batch + 1} \(epoch 1, batch {batch + 1}\) with learning rate \d\.\d\de-0\d; lower",
    ):
        run(shape, {**data, "train": train}, QUICK)


def test_a_loss_that_breaks_in_a_later_epoch_says_which(shape: PalB, data: dict[str, PreferenceData]) -> None:
    states: list[FitState] = []
    config = replace(QUICK, evaluations=44)
    run(shape, data, config, on_state=states.append)
    steps = -(-len(data["train"]) // 32)
    state = next(state for state in states if state.step == 2 * steps + 1)
    broken = {**state.parameters, "logit_scale": torch.tensor(torch.nan)}
    with pytest.raises(NumericsError, match=rf"at step {2 * steps + 2} \(epoch 3, batch 2\)"):
        run(shape, data, config, state=replace(state, parameters=broken))


def test_a_learning_rate_that_blows_up_is_named(shape: PalB, data: dict[str, PreferenceData]) -> None:
    with pytest.raises(
        NumericsError, match=r"The loss is (nan|inf) at step \d+ .* with learning rate \d.*e\+\d\d; lower --lr"
    ):
        run(shape, data, replace(QUICK, lr=1e30))


def test_a_broken_validation_loss_is_named(shape: PalB, cache: Cache, data: dict[str, PreferenceData]) -> None:
    with pytest.raises(
        NumericsError, match=r"The validation loss is nan after step 6 \(epoch 1, batch 6\) with learning rate"
    ):
        run(shape, {**data, "val": poisoned(cache, 5)}, QUICK)


def test_streamed_data_trains_and_gives_the_same_margins(
    shape: PalB, cache: Cache, data: dict[str, PreferenceData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "MEMORY_SHARE", 0)
    streamed = splits_of(cache)
    assert streamed["train"].streamed
    assert not data["train"].streamed
    start = validate(shape, shape.initial(torch.Generator().manual_seed(0)), data["val"])
    states: list[FitState] = []
    result = run(shape, streamed, QUICK, on_state=states.append)
    assert validate(shape, result.parameters, streamed["val"]) == validate(shape, result.parameters, data["val"])
    assert validate(shape, result.parameters, data["val"])[0] < start[0]
    assert same(run(shape, streamed, QUICK, state=states[2]).parameters, result.parameters)


def test_a_small_head_uses_one_thread_and_gives_the_others_back(
    shape: PalB, data: dict[str, PreferenceData], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []
    margins = PalB.margins

    def watched(self: PalB, parameters: Parameters, batch: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return margins(self, parameters, batch, **options)

    monkeypatch.setattr(PalB, "margins", watched)
    try:
        torch.set_num_threads(3)
        run(shape, data, replace(QUICK, epochs=1, evaluations=1))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
        seen.clear()
        monkeypatch.setattr(fits, "WORK_PER_THREAD", 1)
        run(shape, data, replace(QUICK, epochs=1, evaluations=1))
        assert set(seen) == {3}
        with pytest.raises(NumericsError, match="lower --lr"):
            run(shape, data, replace(QUICK, lr=1e30))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_one_user_and_one_comparison_are_enough_for_fit(data: dict[str, PreferenceData]) -> None:
    one = data["train"].take(np.array([3])).with_users([data["train"].users[int(data["train"].user[3])]])
    result = fit(PalB(10, 4, 2, 1, "mlp0-linear-dropout0", 1.0), one, one, FitConfig(epochs=30, lr=0.05))
    assert result.history[-1].val_loss < 0.1
