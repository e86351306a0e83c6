"""Whole heads against numpy in float64: margins, losses and their gradients, over shapes; nearer items come first."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from palcache.choices import Score, UserForm
from palcache.configs import FitConfig, HeadConfig
from palcache.heads import PalA, PalB, Parameters, build_head
from palcache.objectives import Objective
from palcache.tensors import PairBatch
from tests.building import all_pairs, generator, make_data

Array = npt.NDArray[np.float64]
SCORES: tuple[Score, ...] = get_args(Score)
FORMS: tuple[UserForm | None, ...] = (None, *get_args(UserForm))
STEP = 1e-6


def mlp(parameters: dict[str, Array], prefix: str, x: Array, *, copy: int | None = None) -> Array:
    """Return the image of one vector under a hidden layer with ReLU and an output layer."""

    def layer(at: int, x: Array) -> Array:
        weight, bias = (parameters[f"{prefix}{at}.{name}"] for name in ("weight", "bias"))
        if copy is not None:
            weight, bias = weight[copy], bias[copy]
        out: Array = weight @ x + bias
        return out

    return layer(1, np.maximum(layer(0, x), 0))


def unit(x: Array) -> Array:
    norm = np.linalg.norm(x)
    return x / norm if norm else x


def reward(score: Score, x: Array, a: Array, s: float) -> float:
    if score in {"angle", "angle_hinge"}:
        return float(s * unit(x) @ unit(a))
    if score == "dist_normalized":
        return -float(np.linalg.norm(unit(x) - unit(a)))
    return -float(np.linalg.norm(x - a)) * (s if score == "dist_logistic" else 1.0)


def numpy_margins(head: PalA | PalB, parameters: dict[str, Array], batch: PairBatch) -> Array:
    """Return margins, one comparison after the other."""
    s = min(float(np.exp(parameters["logit_scale"])), 100.0)
    out = []
    for i in range(len(batch.y)):
        logits = parameters["user.logits"][int(batch.user[i])] / head.temperature
        w = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        if isinstance(head, PalB):
            prompt = batch.prompts[int(batch.prompt[i])].numpy()
            ideal = sum(w[j] * mlp(parameters, "g.", prompt, copy=j) for j in range(head.k))
        else:
            rows = parameters["prototypes"]
            images = [mlp(parameters, "f.", row) for row in rows] if head.user_form not in {"Pw", "f(Pw)"} else []
            match head.user_form:
                case "Pw":
                    ideal = w @ rows
                case "f(Pw)":
                    ideal = mlp(parameters, "f.", w @ rows)
                case "f(P)w":
                    ideal = w @ np.stack(images)
                case _:
                    ideal = w @ np.stack([unit(image) for image in images])
        sides = [
            mlp(parameters, "f.", batch.responses[int(r[i])].numpy()) for r in (batch.response_1, batch.response_2)
        ]
        left, right = (reward(head.score, side, np.asarray(ideal), s) for side in sides)
        out.append(right - left)
    return np.array(out)


def numpy_loss(head: PalA | PalB, parameters: dict[str, Array], batch: PairBatch) -> float:
    margins, y = numpy_margins(head, parameters, batch), batch.y.numpy()
    if head.loss == "hinge":
        return float(np.maximum(0, 1 - y * margins).mean())
    return float(np.logaddexp(0, -y * margins).mean())


def numbers(parameters: Parameters) -> dict[str, Array]:
    return {name: value.detach().numpy().copy() for name, value in parameters.items()}


def draw(
    form: UserForm | None, score: Score, d: int, p: int, k: int, seed: int
) -> tuple[PalA | PalB, Parameters, PairBatch]:
    options: dict[str, Any] = {"head": "pal-b"} if form is None else {"head": "pal-a", "user_form": form}
    config = HeadConfig(
        k=k, p=p, projector="mlp1-relu-dropout0", score=score, start="published", temperature=0.7, **options
    )
    head = build_head(config, d=d, users=3)
    assert isinstance(head, PalA | PalB)
    batch = all_pairs(make_data(5, 3, d, seed=seed))
    wide = {name: getattr(batch, name).double() for name in ("prompts", "responses", "y")}
    parameters = {name: value.double() for name, value in head.initial(generator(seed)).items()}
    return head, parameters, dataclasses.replace(batch, **wide)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=8, deadline=None)
@given(d=st.integers(1, 6), p=st.integers(1, 5), k=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_margins_and_loss(form: UserForm | None, score: Score, d: int, p: int, k: int, seed: int) -> None:
    head, parameters, batch = draw(form, score, d, p, k, seed)
    want = numpy_margins(head, numbers(parameters), batch)
    np.testing.assert_allclose(head.margins(parameters, batch).numpy(), want, rtol=1e-9, atol=1e-9)
    loss = float(Objective(head, FitConfig())(parameters, batch))
    assert loss == pytest.approx(numpy_loss(head, numbers(parameters), batch), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=4, deadline=None)
@given(d=st.integers(2, 4), p=st.integers(2, 4), k=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_gradients(form: UserForm | None, score: Score, d: int, p: int, k: int, seed: int) -> None:
    """Along a random direction the gradient is the difference quotient of numpy's loss, unless a corner lies between."""
    head, parameters, batch = draw(form, score, d, p, k, seed)
    leaves = {name: value.clone().requires_grad_(head.trains(name)) for name, value in parameters.items()}
    Objective(head, FitConfig())(leaves, batch).backward()  # type: ignore[no-untyped-call]
    g = generator(seed + 1)
    along = {name: torch.randn(value.shape, generator=g, dtype=torch.float64) for name, value in parameters.items()}
    slope = sum(float((leaf.grad * along[name]).sum()) for name, leaf in leaves.items() if leaf.grad is not None)

    def moved(step: float) -> float:
        names = {name: value + step * along[name] if head.trains(name) else value for name, value in parameters.items()}
        return numpy_loss(head, numbers(names), batch)

    middle, ahead, behind = moved(0.0), moved(STEP), moved(-STEP)
    assume(abs(ahead - 2 * middle + behind) < 1e-3 * STEP)  # else a ReLU or a hinge turns here
    assert slope == pytest.approx((ahead - behind) / (2 * STEP), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_a_nearer_item_comes_first(score: Score, form: UserForm | None, flipped: bool) -> None:
    """An item beside the user's ideal point beats one far off; with a flipped sign the check fails."""
    options: dict[str, Any] = {"head": "pal-b"} if form is None else {"head": "pal-a", "user_form": form}
    head = build_head(
        HeadConfig(k=3, p=6, projector="identity", score=score, start="published", **options), d=6, users=4
    )
    assert isinstance(head, PalA | PalB)
    parameters, data = head.initial(generator(5)), make_data(4, 4, 6)
    ideal = head.points(parameters, all_pairs(data))[2]
    batch = dataclasses.replace(
        all_pairs(data), responses=torch.cat([0.2 - 1.5 * ideal, 1.02 * ideal + 0.01]), response_1=torch.arange(4),
        response_2=torch.arange(4) + 4,
    )  # fmt: skip
    margins = head.margins(parameters, batch) * (-1 if flipped else 1)
    assert bool((margins > 0).all()) == (not flipped)
