"""From computed vectors to stored ones: against a float64 reference, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palcache.configs import StoredDtype
from palcache.numerics import UnfitRowError, to_stored


def vectors() -> torch.Tensor:
    return (
        torch.randn((5, 33), generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-6, 1, 9, 1e3, 0])[:, None]
    )


def test_int8_is_the_nearest_multiple_of_its_scale() -> None:
    stored = to_stored(vectors(), "int8")
    exact = vectors().double().numpy()
    assert stored.scales is not None
    assert stored.values.dtype == np.int8
    assert stored.scales == pytest.approx(np.abs(exact).max(axis=1) / 127, rel=1e-6)
    error = np.abs(stored.values * stored.scales[:, None].astype(np.float64) - exact)
    assert (error <= stored.scales[:, None] * 0.5001).all()
    assert stored.values[4].tolist() == [0] * 33


@pytest.mark.parametrize(("dtype", "floor"), [("float16", 0.9999), ("bfloat16", 0.9999), ("int8", 0.999)])
def test_cosines_are_those_to_the_exact_vectors(dtype: StoredDtype, floor: float) -> None:
    stored = to_stored(vectors()[1:4], dtype)
    values = stored.values.astype(np.float64)
    if dtype == "bfloat16":
        values = torch.from_numpy(stored.values.view(np.int16)).view(torch.bfloat16).double().numpy()
    exact = vectors()[1:4].double().numpy()
    cosine = (values * exact).sum(1) / np.linalg.norm(values, axis=1) / np.linalg.norm(exact, axis=1)
    assert stored.cosines == pytest.approx(cosine, abs=1e-6)
    assert (stored.cosines > floor).all()


def test_zero_vectors_count_as_kept() -> None:
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        assert to_stored(torch.zeros(1, 4), dtype).cosines.tolist() == [1.0]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_not_finite_is_refused(dtype: StoredDtype) -> None:
    bad = vectors()
    bad[2, 3] = torch.nan
    with pytest.raises(UnfitRowError, match="A vector is not finite") as caught:
        to_stored(bad, dtype)
    assert (caught.value.row, caught.value.finite) == (2, False)


def test_float16_is_never_clipped() -> None:
    with pytest.raises(UnfitRowError, match=r"beyond the range of float16 \(65504\)") as caught:
        to_stored(vectors() * 1e3, "float16")
    assert (caught.value.row, caught.value.finite) == (3, True)
    assert to_stored(vectors() * 1e3, "int8").cosines.min() > 0.999
