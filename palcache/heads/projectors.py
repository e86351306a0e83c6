"""Projectors: small multilayer perceptrons as pure functions of their parameters.

A name of the grammar `mlp{L}-{relu|gelu|linear}-dropout{D}[-residual][-batchnorm][-nobias]` stands for L hidden layers of
width p, each followed by (batchnorm,) dropout and activation, and one output layer: `mlp2` has three linear layers. `D` are
the digits after the decimal point: `dropout05` is 0.05, `dropout5` is 0.5. (Published PAL implementation, github
RamyaLab/pluralistic-alignment.) Running statistics of a batchnorm are parameters too, which no gradient changes: a
training pass returns new ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F

from palcache.choices import PROJECTOR, PROJECTOR_GRAMMAR
from palcache.errors import InputError
from palcache.noises import RowNoise

Parameters = dict[str, torch.Tensor]

EPSILON: Final = 1e-5
MOMENTUM: Final = 0.1
"""Of a batchnorm: torch's defaults, which the published implementation keeps."""
STATISTICS: Final = ("mean", "var", "count")


def is_buffer(name: str) -> bool:
    """Return whether a parameter is a running statistic, which no gradient changes."""
    stem, _, last = name.rpartition(".")
    return last in STATISTICS and stem.endswith(".norm")


@final
@dataclass(frozen=True, slots=True)
class Projector:
    """A map from width d to width p, or m such maps that share their input.

    Attributes:
        d: input width.
        p: output width.
        copies: None for one map; m for m maps with their own parameters, stacked on a leading axis.
        hidden: number of hidden layers, L; -1 is the identity.
        activation: `relu`, `gelu` or `linear`.
        dropout: probability in [0, 1).
        residual: add the input to the output; needs d = p.
        bias: the linear layers have a bias.
        batchnorm: the hidden layers have a batchnorm after the linear map.
    """

    d: int
    p: int
    copies: int | None
    hidden: int
    activation: str
    dropout: float
    residual: bool
    bias: bool
    batchnorm: bool = False

    @classmethod
    @functools.cache
    def parse(cls, name: str, *, d: int, p: int, copies: int | None = None) -> Projector:
        """Build a projector from a name of the grammar.

        Raises:
            InputError: the name is outside the grammar, or it asks d = p and they differ.
        """
        match = PROJECTOR.fullmatch(name)
        if match is None:
            raise InputError(f"Got the projector {name!r}; expected {PROJECTOR_GRAMMAR}.")
        identity = name == "identity"
        if (identity or match["residual"]) and d != p:
            kind = "identity" if identity else "a residual projector"
            raise InputError(f"Got {name!r} with d = {d} and p = {p}; {kind} needs d = p: choose --p {d}.")
        if identity:
            return cls(d, p, copies, -1, "linear", 0.0, residual=False, bias=False)
        return cls(
            d,
            p,
            copies,
            int(match["hidden"]),
            match["activation"],
            float("0." + match["dropout"]),
            residual=match["residual"] is not None,
            bias=match["nobias"] is None,
            batchnorm=match["batchnorm"] is not None and int(match["hidden"]) > 0,
        )

    def initial(self, generator: torch.Generator) -> Parameters:
        """Draw parameters as `torch.nn.Linear` does: uniform in +-1/sqrt(fan in), weights and biases."""
        lead = () if self.copies is None else (self.copies,)
        parameters: Parameters = {}
        for layer, fan_in in enumerate(self._widths()):
            bound = 1 / math.sqrt(fan_in)
            weight = torch.empty(*lead, self.p, fan_in).uniform_(-bound, bound, generator=generator)
            parameters[f"{layer}.weight"] = weight
            if self.bias:
                parameters[f"{layer}.bias"] = torch.empty(*lead, self.p).uniform_(-bound, bound, generator=generator)
            if self.batchnorm and layer < self.hidden:
                parameters |= {f"{layer}.norm.{name}": torch.ones(*lead, self.p) for name in ("weight", "var")}
                parameters |= {f"{layer}.norm.{name}": torch.zeros(*lead, self.p) for name in ("bias", "mean")}
                parameters[f"{layer}.norm.count"] = torch.zeros(lead, dtype=torch.int64)
        return parameters

    def _widths(self) -> list[int]:
        return [self.d, *[self.p] * self.hidden] if self.hidden >= 0 else []

    def __call__(
        self,
        parameters: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        noise: RowNoise | None = None,
        updates: Parameters | None = None,
    ) -> torch.Tensor:
        """Project rows.

        Args:
            parameters: as `initial` draws them.
            x: (m, d).
            noise: dropout of these rows in training; None in evaluation.
            updates: in training, receives the new running statistics of batchnorms, which then normalise with those of
                the rows; None in evaluation.

        Returns:
            (m, p), or (copies, m, p).
        """
        out = x if self.copies is None else x.expand(self.copies, *x.shape)
        keep = self._keep(x, noise)
        for layer in range(len(self._widths())):
            if layer:
                if self.batchnorm:
                    out = _normalise(parameters, f"{layer - 1}.norm.", out, updates)
                out = self._activate(out if keep is None else out * keep[layer - 1].to(out.dtype))
            out = self._linear(parameters, layer, x if layer == 0 else out)
        return out + x if self.residual else out

    def _keep(self, x: torch.Tensor, noise: RowNoise | None) -> tuple[torch.Tensor, ...] | None:
        """Return the factors of dropout for each hidden layer, drawn at once."""
        if noise is None or self.hidden < 1 or not noise.drops(self.dropout):
            return None
        factors = noise.keep(self.hidden * self.p, self.dropout, x.dtype, copies=self.copies)
        return torch.split(factors, self.p, dim=-1)

    def _linear(self, parameters: Mapping[str, torch.Tensor], layer: int, x: torch.Tensor) -> torch.Tensor:
        """Return a linear layer's image: the product, and then the bias, so that a stack of heads rounds as one head does.

        (A product that begins with the bias adds it before the rest of the sum.)
        """
        weight, bias = parameters[f"{layer}.weight"], parameters.get(f"{layer}.bias")
        if self.copies is not None and layer == 0:  # the copies share their input: one product for all of them
            flat = torch.matmul(x, weight.reshape(-1, self.d).transpose(-1, -2))
            product = flat.reshape(len(x), self.copies, self.p).transpose(0, 1)
        else:
            product = torch.matmul(x, weight.transpose(-1, -2))
        return product if bias is None else product + bias.unsqueeze(-2)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == "relu":
            return F.relu(x)
        return F.gelu(x) if self.activation == "gelu" else x


def _normalise(
    parameters: Mapping[str, torch.Tensor], prefix: str, x: torch.Tensor, updates: Parameters | None
) -> torch.Tensor:
    """Return batch-normalised rows of x, (..., m, p): by their own statistics in training, else by the running ones.

    A single row is normalised to the bias, and its running variance is that of no spread.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, var = parameters[prefix + "mean"], parameters[prefix + "var"]
    if updates is not None:
        rows = x.shape[-2]
        old_mean, old_var = mean, var
        mean, var = x.mean(-2), x.var(-2, correction=0)
        unbiased = var.detach() * (rows / max(rows - 1, 1))
        updates[prefix + "mean"] = torch.lerp(old_mean, mean.detach(), MOMENTUM)
        updates[prefix + "var"] = torch.lerp(old_var, unbiased, MOMENTUM)
        updates[prefix + "count"] = parameters[prefix + "count"] + 1
    centred = (x - mean.unsqueeze(-2)) * torch.rsqrt(var + EPSILON).unsqueeze(-2)
    return centred * parameters[prefix + "weight"].unsqueeze(-2) + parameters[prefix + "bias"].unsqueeze(-2)
