"""Forward passes ahead of the writing give the same rows, on CUDA by asynchronous copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palcache.embedding.forwards import Forwards, Rows
from palcache.encoders import States, TokenizedTexts
from tests.stubs import StubEncoder

TEXTS = [f"text {number}" for number in range(40)]
BATCHES = [np.arange(start, start + 5) for start in range(0, 40, 5)]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_order_and_the_clock_runs(workers: int) -> None:
    stub = StubEncoder(workers=workers, seconds=0.01)
    window = stub.tokenize(TEXTS, "response")
    forwards = Forwards(lambda window, rows: States(stub.encode(window, rows, "response")), workers)
    found = [(rows.tolist(), forward().pooled) for rows, forward in forwards.all(window, BATCHES)]
    assert [rows for rows, _ in found] == [rows.tolist() for rows in BATCHES]
    for rows, vectors in found:
        assert torch.equal(vectors, stub.encode(window, np.array(rows), "response"))
    assert forwards.clock.seconds >= 0.01 * len(BATCHES) / workers * 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_vectors_from_a_gpu_come_back_pinned_and_whole() -> None:
    stub = StubEncoder()
    window = stub.tokenize(TEXTS, "response")

    def encode(window: TokenizedTexts, rows: Rows) -> States:
        vectors = stub.encode(window, rows, "response").cuda()
        return States(vectors, tokens=vectors.repeat_interleave(2, dim=0))

    forwards = Forwards(encode, 1)
    found = [forward() for _, forward in forwards.all(window, BATCHES)]
    for rows, states in zip(BATCHES, found, strict=True):
        assert torch.equal(states.pooled, stub.encode(window, rows, "response"))
        assert states.tokens is not None
        assert torch.equal(states.tokens[::2], states.pooled)
    assert all(states.pooled.is_pinned() for states in found[1:])
    assert forwards.clock.seconds > 0
