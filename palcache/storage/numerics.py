"""From computed vectors to stored ones and back; what does not fit is refused, never clipped in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.configs import StoredDtype
from palcache.errors import NumericsError

INT8_MAX: Final = 127


@final
class UnfitRowError(NumericsError):
    """A vector that cannot be stored, with its place in the batch; `finite` where only the stored type is too small."""

    def __init__(self, message: str, row: int, *, finite: bool) -> None:
        super().__init__(message)
        self.row, self.finite = row, finite


@final
@dataclass(frozen=True, slots=True, eq=False)
class StoredVectors:
    """Vectors as they are stored, m of them.

    Attributes:
        values: (m, d); bfloat16 as its bits in uint16.
        norms: Euclidean norms before, (m,).
        scales: of int8, what a row's bytes are multiplied with, (m,); else None.
    """

    values: npt.NDArray[Any]
    norms: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float32] | None


def to_stored(vectors: torch.Tensor, dtype: StoredDtype) -> StoredVectors:
    """Return vectors as they are stored.

    A row of int8 has the scale max |x| / 127, and values are rounded to the nearest, half to even.

    Args:
        vectors: (m, d) float32.
        dtype: the stored type.

    Raises:
        NumericsError: a value is not finite, or beyond the range of float16.
    """
    vectors = vectors.float()
    norms = torch.linalg.vector_norm(vectors, dim=1)
    _refuse(~torch.isfinite(norms), "A vector is not finite", finite=False)
    stored, scales = _rounded(vectors, dtype)
    if dtype == "float16":
        _refuse(torch.isinf(stored).any(dim=1), "A vector has a value beyond the range of float16 (65504)", finite=True)
    values: npt.NDArray[Any] = (stored.view(torch.int16) if dtype == "bfloat16" else stored).cpu().numpy()
    return StoredVectors(
        values.view(np.uint16) if dtype == "bfloat16" else values,
        norms.cpu().numpy(),
        None if scales is None else scales.cpu().numpy(),
    )


def _rounded(vectors: torch.Tensor, dtype: StoredDtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return vectors in a stored type, and of int8 the scale of each row."""
    if dtype != "int8":
        return vectors.to(getattr(torch, dtype)), None
    scales = vectors.abs().amax(dim=1) / INT8_MAX
    steps = vectors / torch.where(scales > 0, scales, 1.0)[:, None]
    return steps.round().clamp(-INT8_MAX, INT8_MAX).char(), scales


def stored_cosines(vectors: torch.Tensor, dtype: StoredDtype) -> npt.NDArray[np.float32]:
    """Return the cosine of each vector as it is stored to what was computed, (m,); 1 where both are zero.

    This takes longer than storing them, so it is for a sample.

    Args:
        vectors: (m, d) float32.
        dtype: the stored type.
    """
    exact = vectors.float()
    stored = _rounded(exact, dtype)[0].float()  # a row's scale has no part in its cosine
    stored = stored / stored.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    exact = exact / exact.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    product = torch.linalg.vector_norm(stored, dim=1) * torch.linalg.vector_norm(exact, dim=1)
    cosines = (exact * stored).sum(dim=1) / torch.where(product > 0, product, 1.0)
    found: npt.NDArray[np.float32] = torch.where((exact == 0).all(dim=1), 1.0, cosines).cpu().numpy()
    return found


def _refuse(bad: torch.Tensor, message: str, *, finite: bool) -> None:
    if bool(bad.any()):
        raise UnfitRowError(message, int(torch.nonzero(bad)[0]), finite=finite)
