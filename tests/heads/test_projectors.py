"""Projectors follow their grammar and equal a float64 reference; `mlp2` is three linear layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palcache.choices import PROJECTOR_GRAMMAR
from palcache.errors import InputError
from palcache.heads import Parameters, Projector
from palcache.noises import Noise, RowNoise

Floats = npt.NDArray[np.float64]


def reference(projector: Projector, parameters: Mapping[str, torch.Tensor], x: Floats, copy: int | None) -> Floats:
    """Return one row at a time, one layer at a time, in float64."""
    out = []
    for row in x:
        now = row
        for layer in range(projector.hidden + 1):
            weight = parameters[f"{layer}.weight"].double().numpy()
            bias = parameters[f"{layer}.bias"].double().numpy() if projector.bias else np.zeros(weight.shape[:-1])
            if copy is not None:
                weight, bias = weight[copy], bias[copy]
            if layer and projector.activation == "relu":
                now = np.maximum(now, 0)
            if layer and projector.activation == "gelu":
                now = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in now])
            now = weight @ now + bias
        out.append(now + row if projector.residual else now)
    return np.array(out)


def drawn(seed: int, rows: int) -> RowNoise:
    return Noise.of(seed).at("items", torch.arange(rows))


def doubles(parameters: Parameters) -> Parameters:
    return {name: value.double() for name, value in parameters.items()}


@st.composite
def names(draw: st.DrawFn) -> str:
    activation, digits = (
        draw(st.sampled_from(["relu", "gelu", "linear"])),
        draw(st.sampled_from(["0", "05", "5", "25"])),
    )
    suffix = draw(st.sampled_from(["", "-residual"])) + draw(st.sampled_from(["", "-nobias"]))
    return f"mlp{draw(st.integers(0, 3))}-{activation}-dropout{digits}{suffix}"


@given(
    name=st.one_of(names(), st.just("identity")),
    d=st.integers(1, 7),
    p=st.integers(1, 7),
    copies=st.sampled_from([None, 1, 3]),
    rows=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_projections_equal_the_reference(name: str, d: int, p: int, copies: int | None, rows: int, seed: int) -> None:
    if "residual" in name or name == "identity":
        p = d
    projector = Projector.parse(name, d=d, p=p, copies=copies)
    parameters = doubles(projector.initial(torch.Generator().manual_seed(seed)))
    x = np.random.default_rng(seed).normal(size=(rows, d))
    found = projector(parameters, torch.from_numpy(x)).numpy()
    assert found.shape == ((rows, p) if copies is None else (copies, rows, p))
    for copy in range(copies or 1):
        expected = reference(projector, parameters, x, None if copies is None else copy)
        np.testing.assert_allclose(found if copies is None else found[copy], expected.reshape(rows, p), atol=1e-12)


def test_the_reference_would_notice_a_missing_layer() -> None:
    projector = Projector.parse("mlp2-linear-dropout0-nobias", d=3, p=2)
    parameters = doubles(projector.initial(torch.Generator().manual_seed(1)))
    x = torch.ones(1, 3, dtype=torch.float64)
    one_short = x @ parameters["0.weight"].T @ parameters["1.weight"].T
    assert not torch.allclose(projector(parameters, x), one_short)


@pytest.mark.parametrize(("name", "layers"), [("mlp0-relu-dropout0", 1), ("mlp2-relu-dropout0", 3), ("identity", 0)])
def test_mlp_l_has_l_hidden_layers_and_an_output(name: str, layers: int) -> None:
    parameters = Projector.parse(name, d=5, p=5).initial(torch.Generator())
    assert sorted(parameters) == sorted(f"{layer}.{part}" for layer in range(layers) for part in ("bias", "weight"))


@pytest.mark.parametrize(
    ("digits", "probability"), [("0", 0.0), ("1", 0.1), ("05", 0.05), ("5", 0.5), ("2", 0.2), ("25", 0.25), ("10", 0.1)]
)
def test_dropout_digits_stand_after_the_point(digits: str, probability: float) -> None:
    assert Projector.parse(f"mlp1-relu-dropout{digits}", d=3, p=2).dropout == probability


@pytest.mark.parametrize(
    "name",
    ["", "mlp", "mlp2", "mlp2-relu", "mlp2-tanh-dropout1", "mlp-relu-dropout1", "mlp2-relu-dropout", "identity-nobias",
     "mlp2-relu-dropout1-nobias-residual", "mlp2-relu-dropout1-nobias-batchnorm",
     " mlp2-relu-dropout1", "mlp2-relu-dropout1\n"],
)  # fmt: skip
def test_other_names_are_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(InputError, match="expected identity or mlp") as caught:
        Projector.parse(name, d=3, p=2)
    assert PROJECTOR_GRAMMAR in str(caught.value)


@pytest.mark.parametrize("name", ["identity", "mlp1-relu-dropout1-residual"])
def test_a_projector_that_keeps_the_width_needs_p_equal_to_d(name: str) -> None:
    with pytest.raises(InputError, match=r"with d = 7 and p = 3; .* needs d = p: choose --p 7\.$"):
        Projector.parse(name, d=7, p=3)


def test_initial_weights_are_uniform_in_their_bounds() -> None:
    parameters = Projector.parse("mlp1-relu-dropout0", d=400, p=100, copies=3).initial(torch.Generator().manual_seed(1))
    assert parameters["0.weight"].shape == (3, 100, 400)
    for name, fan_in in (("0.weight", 400), ("0.bias", 400), ("1.weight", 100), ("1.bias", 100)):
        values, bound = parameters[name], 1 / math.sqrt(fan_in)
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.95 * bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_dropout_depends_on_its_noise_alone() -> None:
    projector = Projector.parse("mlp1-linear-dropout25", d=4, p=50)
    parameters = projector.initial(torch.Generator().manual_seed(1))
    x = torch.ones(30, 4)
    torch.manual_seed(0)
    first = projector(parameters, x, drawn(3, 30))
    torch.manual_seed(1)
    assert torch.equal(first, projector(parameters, x, drawn(3, 30)))
    assert not torch.equal(first, projector(parameters, x, drawn(4, 30)))
    assert torch.equal(projector(parameters, x), projector(parameters, x))


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    projector = Projector.parse("mlp1-linear-dropout25-nobias", d=1, p=1)
    parameters = {"0.weight": torch.ones(1, 1), "1.weight": torch.ones(1, 1)}
    out = projector(parameters, torch.ones(40_000, 1), drawn(3, 40_000))
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(out.mean()) == pytest.approx(1, abs=0.02)


def test_dropout_stands_before_the_activation_and_not_after_the_output() -> None:
    projector = Projector.parse("mlp1-relu-dropout5", d=2, p=3)
    parameters = projector.initial(torch.Generator().manual_seed(5))
    out = projector(parameters, torch.ones(200, 2), drawn(6, 200))
    assert bool((out != 0).all())  # the output layer's bias is never dropped
