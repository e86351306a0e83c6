"""Reduced comparisons give the head's own margins, whatever d and p are."""

from __future__ import annotations

import numpy as np
import torch

from palcache.checkpoints import TrainedHead
from palcache.heads import PalB
from palcache.reductions import reduce_comparisons
from palcache.tensors import PairBatch, PreferenceData

D, P, K, PROMPTS, RESPONSES, N, U = 7, 5, 3, 11, 13, 101, 4


class _Vectors:
    """Stands for a table of vectors in memory."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.width, self.streamed = rows, rows.shape[1], False

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows[index]


def data() -> PreferenceData:
    generator = torch.Generator().manual_seed(1)

    def numbers(high: int) -> torch.Tensor:
        return torch.randint(high, (N,), generator=generator)

    left = numbers(RESPONSES)
    return PreferenceData(
        prompts=_Vectors(torch.randn(PROMPTS + 2, D, generator=generator)),
        responses=_Vectors(torch.randn(RESPONSES + 3, D, generator=generator)),
        prompt=numbers(PROMPTS) + 1,
        response_1=left,
        response_2=(left + 1 + numbers(RESPONSES - 1)) % RESPONSES,
        user=numbers(U),
        y=numbers(2).float() * 2 - 1,
        users=tuple(f"u.{i}" for i in range(U)),
    )


def test_margins_are_the_heads() -> None:
    for temperature in (1.0, 0.7):
        shape = PalB(D, P, K, U, "mlp1-relu-dropout1", temperature)
        parameters = shape.initial(torch.Generator().manual_seed(0))
        parameters["user.logits"] = torch.randn(U, K, generator=torch.Generator().manual_seed(2))
        head, pairs = TrainedHead(shape, parameters, tuple(f"u.{i}" for i in range(U)), {}), data()
        reduced = reduce_comparisons(head, pairs)
        batch: PairBatch = pairs.batch(torch.arange(N))
        expected = shape.margins(parameters, batch)
        torch.testing.assert_close(reduced.margins(head.mixtures).float(), expected, rtol=1e-4, atol=1e-5)
        assert reduced.b.shape == (N, K)
        assert reduced.grams.shape == (len(torch.unique(pairs.prompt)), K, K)
        assert reduced.counts.tolist() == np.bincount(pairs.user.numpy(), minlength=U).tolist()
