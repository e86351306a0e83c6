"""Noise of training as a pure function of a key, a site, a row and a column: no state, no order of draws.

A number depends on what it is for, not on what was drawn before it. So a head gets the same noise alone and in a stack of
heads, rows that are added or repeated in a batch change nothing for the others, and a resumed run goes on as it would have.
Keys may be batched (`torch.func.vmap`).

A row's name and the key make a well-mixed 32-bit word (multiplied, shifted and multiplied again in 64 bits); its product
with the column's random odd constant goes through one more round in 32 bits, and of the result the highest bits count.
Everything is integer arithmetic, so every device draws the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
import torch

from palcache.fingerprints import well_mixed

Site = Literal["items", "ideal points", "prototypes", "mixtures"]
"""What noise is for; sites share none."""
_SITES: Final[dict[Site, int]] = {"items": 1, "ideal points": 3, "prototypes": 4, "mixtures": 5}
_ROW: Final = -0x61C8864680B583EB
_MIX: Final = -0x40A7B892E31B1A47
_ROUND: Final = 0x2C1B3C6D
"""Odd multipliers: two of splitmix64 (Steele, Lea and Flood, 2014), and one of a 32-bit finaliser (Wellons, 2018)."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Dropout:
    """A rate of dropout, p, as it is compared with random words.

    Attributes:
        threshold: the least word that is kept, p 2^32 - 2^31.
        scale: 1 / (1 - p), ().
    """

    threshold: torch.Tensor | int
    scale: torch.Tensor

    @classmethod
    @functools.cache
    def of(cls, p: float, dtype: torch.dtype, device: torch.device) -> Dropout:
        """Return a rate in [0, 1), for factors of a dtype."""
        return cls(_threshold(p), torch.tensor(1 / (1 - p), dtype=dtype, device=device))

    @classmethod
    def stacked(cls, rates: Sequence[float], device: torch.device) -> Dropout:
        """Return one rate per head, (h,)."""
        thresholds = torch.tensor([_threshold(p) for p in rates], dtype=torch.int32, device=device)
        return cls(thresholds, torch.tensor([1 / (1 - p) for p in rates], dtype=torch.float32, device=device))


def _threshold(p: float) -> int:
    return round(p * 2**32) - 2**31


@final
@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """The noise of one training step.

    Attributes:
        key: int64, (), of `noise_keys`.
        dropout: stands for the projectors' own rate, where heads of different rates are stacked.
    """

    key: torch.Tensor
    dropout: Dropout | None = None

    @classmethod
    def of(cls, seed: int, step: int = 0, *, device: torch.device | str = "cpu") -> Noise:
        """Return the noise of a step of a training."""
        return cls(noise_keys(seed, range(step, step + 1)).to(device)[0])

    def at(self, site: Site, rows: torch.Tensor) -> RowNoise:
        """Return the noise of some rows at a site; rows of equal names, (m,) int64, have the same."""
        return RowNoise(self, site, rows)


@final
@dataclass(frozen=True, slots=True, eq=False)
class RowNoise:
    """Noise for one use of some rows, made by `Noise.at`."""

    noise: Noise
    site: Site
    rows: torch.Tensor

    def drops(self, p: float) -> bool:
        """Return whether anything is to be dropped, where a projector's own rate is p."""
        return p > 0 or self.noise.dropout is not None

    def keep(self, width: int, p: float, dtype: torch.dtype, *, copies: int | None = None) -> torch.Tensor:
        """Return factors of dropout, 0 or 1 / (1 - p), (m, width) or (copies, m, width).

        Args:
            width: columns.
            p: the rate, where the noise has none of its own.
            dtype: of the factors.
            copies: so many blocks, each with its own factors.
        """
        rate = self.noise.dropout or Dropout.of(p, dtype, self.rows.device)
        return torch.where(self._words(width, copies) >= rate.threshold, rate.scale, 0.0)

    def gumbel(self, width: int) -> torch.Tensor:
        """Return standard Gumbel numbers, (m, width) float32."""
        uniform = ((self._words(width) >> 8) + (2**23 + 0.5)) * 2.0**-24  # of 24 bits; never 0 or 1
        return -(-uniform.log()).log()

    def _words(self, width: int, copies: int | None = None) -> torch.Tensor:
        """Return int32 words whose high bits are random, (m, width) or (copies, m, width)."""
        mixed = torch.add(self.noise.key, self.rows, alpha=_ROW)
        mixed = (mixed ^ (mixed >> 32)) * _MIX
        row = (mixed >> 32).to(torch.int32).unsqueeze(-1)
        words = row * _columns(_SITES[self.site], width, copies, self.rows.device)
        words = words ^ (words >> 15)
        return words * _ROUND


def noise_keys(seed: int, steps: range) -> torch.Tensor:
    """Return the keys of some steps of a training, (s,) int64; seed in [0, 2^64)."""
    start = well_mixed(np.array([seed], np.uint64))
    return torch.from_numpy(well_mixed(start + np.arange(steps.start, steps.stop).astype(np.uint64)).view(np.int64))


@functools.cache
def _columns(site: int, width: int, copies: int | None, device: torch.device) -> torch.Tensor:
    """Return random odd constants, (width,) or (copies, 1, width) int32."""
    count = width * (copies or 1)
    words = well_mixed(np.arange(count, dtype=np.uint64) + np.uint64(site << 40)) >> np.uint64(32)
    odd = torch.from_numpy((words | np.uint64(1)).astype(np.uint32).view(np.int32)).to(device)
    return odd if copies is None else odd.reshape(copies, 1, width)
