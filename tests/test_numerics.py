"""From computed to stored vectors: rounding, norms, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palcache.configs import StoredDtype
from palcache.errors import NumericsError
from palcache.numerics import UnfitRowError, to_stored


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 2**16))
def test_vectors_are_rounded_as_torch_rounds(m: int, d: int, dtype: StoredDtype, seed: int) -> None:
    """Every bit is that of torch's conversion; norms are those before it."""
    vectors = torch.randn(m, d, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5)
    stored, norms = to_stored(vectors, dtype)
    expected = vectors.to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16)
    assert stored.dtype == {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
    assert stored.tobytes() == expected.numpy().tobytes()
    np.testing.assert_allclose(norms, np.linalg.norm(vectors.double().numpy(), axis=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
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
    assert to_stored(vectors, "float16")[0][2, 1] == 65_504
