"""Small data and heads that tests share: distinct sizes for all dimensions."""

from __future__ import annotations

import torch

from palcache.spans import ragged_spans
from palcache.tensors import PairBatch, PreferenceData, TensorTable
from palcache.token_batches import TokenBatch, TokenData
from palcache.token_states import RaggedRows


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_data(
    n: int = 40,
    users: int = 5,
    d: int = 7,
    *,
    seed: int = 0,
    prompts: int = 6,
    responses: int = 11,
    joint: bool = False,
) -> PreferenceData:
    """Return random comparisons whose answers follow one linear reward per half of the users."""
    g = generator(seed)
    table = torch.randn(responses, d, generator=g)
    left = torch.randint(responses, (n,), generator=g)
    right = (left + 1 + torch.randint(responses - 1, (n,), generator=g)) % responses
    user = torch.arange(n) % users
    direction = torch.randn(d, generator=g) * torch.where(user % 2 == 0, 1.0, -1.0).unsqueeze(-1)
    y = ((table[right] - table[left]) * direction).sum(-1).sign()
    return PreferenceData(
        TensorTable(torch.randn(prompts, d, generator=g)),
        TensorTable(table),
        torch.randint(prompts, (n,), generator=g),
        left,
        right,
        user,
        torch.where(y == 0, 1.0, y),
        tuple(f"user.{i}" for i in range(users)),
        joint=joint,
    )


def all_pairs(data: PreferenceData) -> PairBatch:
    return data.batch(torch.arange(len(data)))


def make_token_data(
    n: int = 12, users: int = 4, d: int = 7, *, seed: int = 0, joint: bool = False, aligned: bool = False
) -> TokenData:
    """Return random comparisons with ragged token states, prompts as vectors or, where aligned, as states too."""
    g = generator(seed)

    def ragged(texts: int) -> tuple[RaggedRows, torch.Tensor]:
        lengths = torch.randint(2, 9, (texts,), generator=g)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        total = int(offsets[-1])
        return RaggedRows(torch.randn(total, d, generator=g), offsets), torch.randint(3, (total,), generator=g)

    prompts, _ = ragged(5)
    responses, ids = ragged(9)
    left = torch.randint(8, (n,), generator=g)
    right = (left + 1) % 9
    spans = ragged_spans(ids.numpy(), responses.offsets.numpy(), left.numpy(), right.numpy())
    return TokenData(
        prompts if aligned else TensorTable(torch.randn(5, d, generator=g)),
        responses,
        torch.randint(5, (n,), generator=g),
        left,
        right,
        torch.arange(n) % users,
        torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0),
        tuple(f"user.{i}" for i in range(users)),
        torch.stack([torch.from_numpy(spans.first), torch.from_numpy(spans.end)], -1),
        joint=joint,
    )


def all_tokens(data: TokenData) -> TokenBatch:
    return data.batch(torch.arange(len(data)))
