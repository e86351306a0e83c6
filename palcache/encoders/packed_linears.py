"""Faster linear layers on CPUs: oneDNN with weights packed once, where it is there and gives the same numbers.

PyTorch's float32 `nn.Linear` on the CPU goes to MKL, which on AMD processors reaches less than half of what oneDNN does,
and packing the weight anew for every call costs the rest (measured in `benchmarks/`). The operators are those that
`torch.compile` emits for frozen linear layers; they are not public, so each layer is checked against its own output
before it is replaced, and left alone where anything differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def pack_linears(model: nn.Module) -> int:
    """Route the plain linear layers of a frozen model on the CPU through oneDNN; return how many.

    The layers' parameters stay as they are; their results agree with `nn.Linear` within rounding.
    """
    if not _available():
        return 0
    return sum(_pack(module) for module in model.modules())


def _available() -> bool:
    names = ("_linear_pointwise", "_reorder_linear_weight")
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _pack(module: nn.Module) -> bool:
    """Replace the forward of one layer if it is a plain `nn.Linear` on the CPU; return whether it was."""
    if type(module) is not nn.Linear or "forward" in module.__dict__ or hasattr(module, "parametrizations"):
        return False
    if module.weight.device.type != "cpu" or module.weight.dtype not in _TOLERANCE:
        return False
    try:
        with torch.inference_mode(False), torch.no_grad():
            forward = _packed_forward(module)
            probe = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(
                module.weight.dtype
            )
            expected, got = module(probe).float(), forward(probe).float()
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    scale = float(expected.abs().max()) or 1.0
    if not bool(((got - expected).abs() <= _TOLERANCE[module.weight.dtype] * scale).all()):
        return False
    module.__dict__["forward"] = forward
    return True


def _packed_forward(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    operator: Any = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - checked before use
    weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)  # noqa: SLF001
    bias, dtype = None if module.bias is None else module.bias.detach(), module.weight.dtype

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not dtype or x.device.type != "cpu" or not x.numel():
            return nn.functional.linear(x, module.weight, module.bias)
        out: torch.Tensor = operator(x, weight, bias, "none", [], "")
        return out

    return forward
