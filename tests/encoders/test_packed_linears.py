"""Packed linear layers: the same numbers as `nn.Linear`, and nothing else touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from palcache.encoders import packed_linears
from palcache.encoders.packed_linears import pack_linears

IN, OUT = 13, 7


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    """Return a frozen linear layer with random weights."""
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)


def packs(dtype: torch.dtype) -> bool:
    """Return whether this machine packs layers of a type at all."""
    return pack_linears(nn.Sequential(linear(dtype))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (4, 1, 3), (0,), (2, 0)])
def test_results_are_those_of_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    """For any number of leading dimensions, empty ones and inputs that are views."""
    layer = linear(dtype, bias=bias)
    packed = copy.deepcopy(layer)
    pack_linears(packed)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    x = torch.randn(*shape, 2 * IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    for view in (x[..., :IN].contiguous(), x[..., ::2], x[..., IN:]):
        with torch.inference_mode():
            expected, got = layer(view), packed(view)
        assert got.shape == expected.shape
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_a_vector_alone_works() -> None:
    """An input without leading dimensions is an input too."""
    layer, x = linear(), torch.randn(IN, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    pack_linears(layer)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed layer keeps its weights, names and state; where the operators are missing nothing happens."""
    model = nn.Sequential(linear(), nn.ReLU(), linear(bias=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack_linears(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    monkeypatch.setattr(packed_linears, "_available", lambda: False)
    assert pack_linears(nn.Sequential(linear())) == 0


@pytest.mark.skipif(not packs(torch.float32), reason="oneDNN's packed linear is not on this machine")
def test_plain_layers_are_packed_once() -> None:
    """Every plain layer is counted, and a second call finds nothing to do."""
    model = nn.Sequential(linear(), nn.Sequential(linear(bias=False)), nn.LayerNorm(OUT))
    assert pack_linears(model) == 2
    assert pack_linears(model) == 0


class Special(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return twice what a plain layer gives."""
        return 2 * super().forward(x)


def _subclass() -> nn.Module:
    return Special(IN, OUT)


def _parametrized() -> nn.Module:
    layer: nn.Module = parametrizations.weight_norm(nn.Linear(IN, OUT))
    return layer


def _double() -> nn.Module:
    return nn.Linear(IN, OUT).double()


def _convolution() -> nn.Module:
    return nn.Conv1d(IN, OUT, 1)


def _meta() -> nn.Module:
    return nn.Linear(IN, OUT, device="meta")


@pytest.mark.parametrize("build", [_subclass, _parametrized, _double, _convolution, _meta])
def test_other_layers_are_left_alone(build: Callable[[], nn.Module]) -> None:
    """Subclasses, parametrised layers, other types and other devices keep their forward."""
    model = build()
    assert pack_linears(model) == 0
    assert "forward" not in model.__dict__


@pytest.mark.skipif(not packs(torch.float32), reason="oneDNN's packed linear is not on this machine")
@pytest.mark.parametrize("error", [0.01, float("nan"), RuntimeError("unsupported")])
def test_a_layer_whose_numbers_differ_is_left_alone(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """The operators are not public, so each layer is compared with itself before it is replaced."""
    right = packed_linears._packed_forward

    def wrong(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        if isinstance(error, Exception):
            raise error
        forward = right(module)
        return lambda x: forward(x) + error

    monkeypatch.setattr(packed_linears, "_packed_forward", wrong)
    layer = linear()
    assert pack_linears(layer) == 0
    assert "forward" not in layer.__dict__


@pytest.mark.skipif(not packs(torch.float32), reason="oneDNN's packed linear is not on this machine")
def test_inputs_of_another_type_take_the_plain_way() -> None:
    """A float64 input meets the error or result that a plain layer gives."""
    layer = linear()
    pack_linears(layer)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.ones(2, IN, dtype=torch.float64))
