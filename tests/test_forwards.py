"""Forward passes ahead of the writing give the same rows, on CUDA by asynchronous copies."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from palcache.forwards import Forwards
from tests.stubs import StubEncoder

TEXTS = [f"text {number}" for number in range(40)]
BATCHES = [np.arange(start, start + 5) for start in range(0, 40, 5)]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_order_and_the_clock_runs(workers: int) -> None:
    stub = StubEncoder(workers=workers, seconds=0.01)
    window = stub.tokenize(TEXTS, "response")
    forwards = Forwards(stub, "response")
    found = [(rows.tolist(), forward()) for rows, forward in forwards.all(window, BATCHES)]
    assert [rows for rows, _ in found] == [rows.tolist() for rows in BATCHES]
    for rows, vectors in found:
        assert torch.equal(vectors, stub.encode(window, np.array(rows), "response"))
    assert forwards.clock.seconds >= 0.01 * len(BATCHES) / workers * 0.9


@dataclass
class OnCuda:
    """A stub whose vectors come from a GPU."""

    stub: StubEncoder = field(default_factory=StubEncoder)
    workers: int = 1

    def encode(self, *args: object) -> torch.Tensor:
        """Return vectors on the GPU."""
        return self.stub.encode(*args).cuda()  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_vectors_from_a_gpu_come_back_pinned_and_whole() -> None:
    encoder = OnCuda()
    window = encoder.stub.tokenize(TEXTS, "response")
    forwards = Forwards(encoder, "response")  # type: ignore[arg-type]
    found = [forward() for _, forward in forwards.all(window, BATCHES)]
    for rows, vectors in zip(BATCHES, found, strict=True):
        assert torch.equal(vectors.cpu(), encoder.stub.encode(window, rows, "response"))
    assert all(vectors.is_pinned() for vectors in found[1:])
    assert forwards.clock.seconds > 0
