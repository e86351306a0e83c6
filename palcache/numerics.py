"""From computed vectors to stored ones; what does not fit is refused, never clipped in silence."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.configs import StoredDtype
from palcache.errors import NumericsError


@final
class UnfitRowError(NumericsError):
    """A vector that cannot be stored, with its place in the batch; `finite` where only the stored type is too small."""

    def __init__(self, message: str, row: int, *, finite: bool) -> None:
        super().__init__(message)
        self.row, self.finite = row, finite


def to_stored(vectors: torch.Tensor, dtype: StoredDtype) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Return vectors as they are stored, and their norms before.

    Args:
        vectors: (m, d) float32.
        dtype: bfloat16 is returned as its bits in uint16.

    Raises:
        NumericsError: a value is not finite, or beyond the range of float16.
    """
    vectors = vectors.float()
    norms = torch.linalg.vector_norm(vectors, dim=1)
    _refuse(~torch.isfinite(norms), "A vector is not finite", finite=False)
    if dtype == "float16":
        stored = vectors.half()
        _refuse(torch.isinf(stored).any(dim=1), "A vector has a value beyond the range of float16 (65504)", finite=True)
    else:
        stored = vectors.bfloat16().view(torch.int16) if dtype == "bfloat16" else vectors
    array: npt.NDArray[Any] = stored.cpu().numpy()
    return array.view(np.uint16) if dtype == "bfloat16" else array, norms.cpu().numpy()


def _refuse(bad: torch.Tensor, message: str, *, finite: bool) -> None:
    if bool(bad.any()):
        raise UnfitRowError(message, int(torch.nonzero(bad)[0]), finite=finite)
