"""Comparisons with a hidden state at every token position, dense (n, t, d), as token-level losses need them.

Stored token vectors are ragged: values (T, d) and offsets (N + 1,), never padded. `dense_rows` makes them dense, and
`spans` finds the positions that count from token ids and real lengths, never from a pad id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from palcache.choices import PromptAlignment
from palcache.errors import InputError


@final
@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """n comparisons with the hidden states of their texts at t positions.

    Attributes:
        left: states of response_1 (for joint vectors: of prompt and response), (n, t, d).
        right: states of response_2, (n, t, d).
        prompts: one state per prompt, (n, d), or one per position, (n, t, d).
        divergence: first position that counts, (n,) int64.
        end: position after the last that counts, (n,) int64.
        user: number of the user, (n,) int64; -1 is a user whom the head does not know.
        y: -1, 0 or +1, (n,), of the states' dtype.
    """

    left: torch.Tensor
    right: torch.Tensor
    prompts: torch.Tensor
    divergence: torch.Tensor
    end: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor


def dense_rows(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, t: int | None = None) -> torch.Tensor:
    """Return ragged rows as (n, t, ...): positions past a row's end hold its last value, an empty row holds zeros.

    Args:
        values: all rows one after the other, (T, ...): states (T, d) or token ids (T,).
        offsets: row i is values[offsets[i]:offsets[i + 1]], (N + 1,) int64.
        rows: which rows, (n,) int64.
        t: positions; None takes the longest row's, at least 1.
    """
    begin, length = offsets[rows], offsets[rows + 1] - offsets[rows]
    t = max(1, int(length.max()) if len(rows) else 1) if t is None else t
    at = torch.arange(t, device=values.device).minimum((length - 1).clamp(min=0).unsqueeze(-1))
    found = (begin.unsqueeze(-1) + at).clamp(max=max(0, len(values) - 1))
    out = values[found] if len(values) else values.new_zeros((*found.shape, *values.shape[1:]))
    empty = (length == 0).reshape(-1, *[1] * (out.dim() - 1))
    return torch.where(empty, torch.zeros_like(out), out)


def spans(
    left: torch.Tensor, right: torch.Tensor, left_length: torch.Tensor, right_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions that count: from where two responses first differ to the end of the longer one.

    A response that is the other's beginning differs from it where it ends. Equal responses have an empty span.

    Args:
        left: token ids of response_1, (n, t); what stands past the real length does not matter.
        right: token ids of response_2, (n, t).
        left_length: tokens of response_1, (n,).
        right_length: tokens of response_2, (n,).

    Returns:
        First position that counts and position after the last, (n,) int64 each.
    """
    at = torch.arange(left.shape[1], device=left.device)
    in_left, in_right = at < left_length.unsqueeze(-1), at < right_length.unsqueeze(-1)
    differs = (in_left != in_right) | (in_left & in_right & (left != right))
    end = torch.maximum(left_length, right_length)
    first = torch.where(differs, at, left.shape[1]).amin(-1)
    return torch.minimum(first, end), end


@final
@dataclass(frozen=True, slots=True, eq=False)
class RaggedRows:
    """Hidden states and token ids of many texts, ragged.

    Attributes:
        values: (T, d).
        offsets: (N + 1,) int64.
        ids: token ids, (T,); None where spans are known otherwise.
    """

    values: torch.Tensor
    offsets: torch.Tensor
    ids: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each text, (N,)."""
        return self.offsets.diff()


@final
@dataclass(frozen=True, slots=True, eq=False)
class TokenData:
    """Comparisons over texts with a hidden state at every token.

    Attributes:
        prompts: of the distinct prompts; for `pooled` alignment the last state of each is used.
        responses: of the distinct responses, with token ids; of prompt and response where `joint`.
        prompt: row of each comparison's prompt, (n,) int64.
        response_1: row of the left response, (n,).
        response_2: row of the right response, (n,).
        user: number of the user in `users`, (n,); -1 where unknown.
        y: -1, 0 or +1, (n,) float32.
        users: ids of the users.
        alignment: one state per prompt, or its state at the response's position.
        joint: the states are of prompt and response in one forward.
        span: first position and position after the last, (n, 2); None finds them from token ids.
    """

    prompts: RaggedRows
    responses: RaggedRows
    prompt: torch.Tensor
    response_1: torch.Tensor
    response_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor
    users: tuple[str, ...]
    alignment: PromptAlignment = "pooled"
    joint: bool = False
    span: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.y.device

    @property
    def width(self) -> int:
        """Width of the states, d."""
        return self.responses.values.shape[-1]

    @property
    def streamed(self) -> bool:
        """States are in memory."""
        return False

    def take(self, rows: torch.Tensor) -> TokenData:
        """Return some of the comparisons, over the same states."""
        names = ("prompt", "response_1", "response_2", "user", "y")
        span = None if self.span is None else self.span[rows]
        return replace(self, span=span, **{name: getattr(self, name)[rows] for name in names})

    def with_users(self, users: Sequence[str]) -> TokenData:
        """Return the same comparisons with users numbered as in `users`; others become -1."""
        number = {user: i for i, user in enumerate(users)}
        table = torch.tensor([number.get(user, -1) for user in self.users] + [-1], device=self.device)
        return replace(self, user=table[self.user], users=tuple(users))

    def batch(self, rows: torch.Tensor) -> TokenBatch:
        """Return some comparisons, padded to the longest response among them.

        Raises:
            InputError: there are neither spans nor token ids to find them.
        """
        left, right = self.response_1[rows], self.response_2[rows]
        lengths = self.responses.lengths
        t = max(1, int(torch.maximum(lengths[left], lengths[right]).max()))
        divergence, end = self._spans(rows, left, right, t)
        values, offsets = self.responses.values, self.responses.offsets
        prompt = self.prompt[rows]
        if self.alignment == "position":
            prompts = dense_rows(self.prompts.values, self.prompts.offsets, prompt, t)
        else:
            prompts = last_values(self.prompts.values, self.prompts.offsets, prompt)
        return TokenBatch(
            dense_rows(values, offsets, left, t).float(),
            dense_rows(values, offsets, right, t).float(),
            prompts.float(),
            divergence,
            end,
            self.user[rows],
            self.y[rows],
        )

    def _spans(
        self, rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor, t: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.span is not None:
            return self.span[rows, 0], self.span[rows, 1]
        ids, offsets, lengths = self.responses.ids, self.responses.offsets, self.responses.lengths
        if ids is None:
            raise InputError("The token states have no token ids, and no spans are given; give one of them.")
        sides = dense_rows(ids, offsets, left, t), dense_rows(ids, offsets, right, t)
        return spans(sides[0], sides[1], lengths[left], lengths[right])

    def batches(self, size: int) -> Iterator[TokenBatch]:
        """Yield all comparisons in order, `size` at a time."""
        for rows in torch.split(torch.arange(len(self), device=self.device), size):
            yield self.batch(rows)


def last_values(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the last value of ragged rows, (n, ...); zeros for an empty row. Arguments as for `dense_rows`."""
    begin, end = offsets[rows], offsets[rows + 1]
    out = values[(end - 1).clamp(min=0)]
    return torch.where((end == begin).reshape(-1, *[1] * (out.dim() - 1)), torch.zeros_like(out), out)
