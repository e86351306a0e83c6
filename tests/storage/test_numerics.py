"""From computed to stored vectors: rounding, norms, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.configs import StoredDtype
from palcache.errors import NumericsError
from palcache.storage.numerics import UnfitRowError, stored_cosines, to_stored


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 2**16))
def test_vectors_are_rounded_as_torch_rounds(m: int, d: int, dtype: StoredDtype, seed: int) -> None:
    """Every bit is that of torch's conversion; norms are those before it."""
    vectors = torch.randn(m, d, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5)
    stored = to_stored(vectors, dtype)
    expected = vectors.to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16)
    assert stored.values.dtype == {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
    assert stored.values.tobytes() == expected.numpy().tobytes()
    np.testing.assert_allclose(stored.norms, np.linalg.norm(vectors.double().numpy(), axis=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(dtype: StoredDtype, value: float) -> None:
    """The first bad row is named, whatever the stored type."""
    vectors = torch.ones(5, 3)
    vectors[3, 1] = vectors[4, 0] = value
    with pytest.raises(NumericsError, match="A vector is not finite") as caught:
        to_stored(vectors, dtype)
    assert isinstance(caught.value, UnfitRowError)
    assert (caught.value.row, caught.value.finite) == (3, False)


@pytest.mark.parametrize("value", [65_520.0, -7e4, 1e18])
def test_what_float16_cannot_hold_is_refused(value: float) -> None:
    """Beyond 65,504, after rounding, float16 has only infinity; nothing is clipped."""
    vectors = torch.zeros(4, 2)
    vectors[2, 1] = value
    with pytest.raises(NumericsError, match=r"beyond the range of float16 \(65504\)") as caught:
        to_stored(vectors, "float16")
    assert isinstance(caught.value, UnfitRowError)
    assert (caught.value.row, caught.value.finite) == (2, True)
    to_stored(vectors, "bfloat16")
    vectors[2, 1] = 65_519.0
    assert to_stored(vectors, "float16").values[2, 1] == 65_504


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
    found = stored_cosines(vectors()[1:4], dtype)
    assert found == pytest.approx(cosine, abs=1e-6)
    assert (found > floor).all()


def test_zero_vectors_count_as_kept() -> None:
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        assert stored_cosines(torch.zeros(1, 4), dtype).tolist() == [1.0]


def test_int8_holds_what_float16_cannot() -> None:
    assert stored_cosines(vectors() * 1e3, "int8").min() > 0.999
