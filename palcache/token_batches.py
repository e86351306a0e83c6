"""Comparisons with a hidden state at every token, as token-level losses need them: the positions of spans, unpadded.

A span goes from the first token at which two responses differ to the end of the longer one. Each of its positions is a
pair of rows of a `PairBatch`, so that only states with a part in the loss are read and projected, and each of them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch

from palcache.cache import Cache, Space
from palcache.choices import PromptAlignment
from palcache.devices import free_memory, resolve_device
from palcache.spans import divergence_spans
from palcache.storage.comparison_files import StoredComparisons
from palcache.table_spaces import find_rows
from palcache.tensors import MEMORY_SHARE, ComparisonData, PairBatch, PreferenceData, on_device
from palcache.token_states import LastStates, RaggedRows, StateRows, StreamedRows, load_rows, take_positions
from palcache.vector_tables import Table, TensorTable, VectorTable, take_rows


@final
@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """n comparisons as the positions of their spans, m in all; an empty span keeps one position without weight.

    Attributes:
        pairs: the states of both responses at each position, a pair of rows each; users and answers are per comparison.
        comparison: which comparison each position is of, (m,) int64, ascending.
        rank: of each position in its span, from 1, (m,) int64; others than 1 to `count` have no part in the loss.
        count: positions of each span, (n,) int64; 0 for an empty one.
    """

    pairs: PairBatch
    comparison: torch.Tensor
    rank: torch.Tensor
    count: torch.Tensor

    @property
    def user(self) -> torch.Tensor:
        """Number of the user, (n,) int64."""
        return self.pairs.user

    @property
    def y(self) -> torch.Tensor:
        """-1, 0 or +1, (n,)."""
        return self.pairs.y

    @classmethod
    def from_dense(
        cls,
        left: torch.Tensor,
        right: torch.Tensor,
        prompts: torch.Tensor,
        span: torch.Tensor,
        user: torch.Tensor,
        y: torch.Tensor,
        *,
        whole: bool = False,
    ) -> TokenBatch:
        """Return a batch of states that are dense already, padded or not.

        Args:
            left: states of response_1, (n, t, d).
            right: states of response_2, (n, t, d).
            prompts: one state per prompt, (n, d), or one per position, (n, t, d).
            span: first position that counts and position after the last, (n, 2) int64; those at or beyond t are not there.
            user: (n,) int64.
            y: (n,), of the states' dtype.
            whole: keep all positions, those outside the spans with weight 0: statistics of batchnorms are then those of
                the published implementation.
        """
        n, t = left.shape[:2]
        first, end = span.unbind(-1)
        count = (end.clamp(max=t) - first).clamp(min=0)
        begin, kept = (torch.zeros_like(first), torch.full_like(first, t)) if whole else (first, count.clamp(min=1))
        comparison, at = _positions(begin, kept)
        place, m = comparison * t + at.clamp(max=t - 1), len(at)
        both = torch.cat([left.flatten(0, 1)[place], right.flatten(0, 1)[place]])
        own = torch.arange(2 * m, device=left.device)
        prompts, prompt = (prompts.flatten(0, 1)[place], own[:m]) if prompts.dim() > 2 else (prompts, own[:n])
        pairs = PairBatch(prompts, prompt, both, own[:m], own[m:], user, y, comparison=comparison)
        return cls(pairs, comparison, at - first[comparison] + 1, count)


def _positions(begin: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which comparison each position is of, and the position: `kept` of them from `begin` on, (m,) each."""
    comparison = torch.repeat_interleave(torch.arange(len(kept), device=kept.device), kept)
    before = kept.cumsum(0) - kept
    return comparison, torch.arange(len(comparison), device=kept.device) + (begin - before)[comparison]


@final
@dataclass(frozen=True, slots=True, eq=False)
class TokenData(ComparisonData[TokenBatch]):
    """Comparisons over texts with a hidden state at every token.

    Attributes:
        prompts: a vector of each distinct prompt, or its states at every token: position t of a prompt then meets position
            t of a response, its last one where it is shorter.
        responses: states of the distinct responses; of prompt and response in one forward where `joint`.
        prompt: row of each comparison's prompt, (n,) int64.
        response_1: row of the left response, (n,).
        response_2: row of the right response, (n,).
        user: number of the user in `users`, (n,); -1 where unknown.
        y: -1, 0 or +1, (n,) float32.
        users: ids of the users.
        span: first position that counts and position after the last, (n, 2) int64.
        joint: the states are of prompt and response in one forward; prompts are then not read.
    """

    prompts: Table | StateRows
    responses: StateRows
    prompt: torch.Tensor
    response_1: torch.Tensor
    response_2: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor
    users: tuple[str, ...]
    span: torch.Tensor
    joint: bool = False

    @property
    def width(self) -> int:
        """Width of the states, d."""
        return self.responses.width

    @property
    def streamed(self) -> bool:
        """States are read batch by batch."""
        return self.responses.streamed or self.prompts.streamed

    def vector_bytes(self, n: int) -> int:
        """Return the bytes that the states of n comparisons take on average."""
        sides = [(self.responses, 2), *([] if self.joint else [(self.prompts, 1)])]
        return round(n * sum(times * _states_per_row(table) * table.row_bytes for table, times in sides))

    @property
    def alignment(self) -> PromptAlignment:
        """What a response's position meets: the prompt's vector, or the prompt's state at the same position."""
        return "position" if isinstance(self.prompts, RaggedRows | StreamedRows) else "pooled"

    def served(self) -> PreferenceData:
        """Return the comparisons as rewards are served: on the last state of each response, and of each prompt."""
        prompts = self.prompts
        return PreferenceData(
            prompts=LastStates(prompts) if isinstance(prompts, RaggedRows | StreamedRows) else prompts,
            responses=LastStates(self.responses),
            prompt=self.prompt,
            response_1=self.response_1,
            response_2=self.response_2,
            user=self.user,
            y=self.y,
            users=self.users,
            joint=self.joint,
        )

    def batch(self, rows: torch.Tensor) -> TokenBatch:
        """Return the spans of some comparisons, with each state that they need once.

        Args:
            rows: row numbers on the data's device, (n,).
        """
        first, end = self.span[rows].unbind(-1)
        count, n = (end - first).clamp(min=0), len(rows)
        comparison, at = _positions(first, count.clamp(min=1))
        both, m = torch.cat([self.response_1[rows], self.response_2[rows]]), len(at)
        owner = torch.cat([comparison, comparison + n])
        responses, place, names = take_positions(self.responses, both, owner, torch.cat([at, at]))
        if isinstance(self.prompts, RaggedRows | StreamedRows):
            prompts, prompt, prompt_names = take_positions(self.prompts, self.prompt[rows], comparison, at)
        else:
            prompts, prompt, prompt_names = take_rows(self.prompts, self.prompt[rows])
        user, y = self.user[rows], self.y[rows]
        pairs = PairBatch(prompts, prompt, responses, place[:m], place[m:], user, y, prompt_names, names, comparison)
        return TokenBatch(pairs, comparison, at - first[comparison] + 1, count)


def _states_per_row(table: Table | StateRows) -> float:
    return float(table.lengths.float().mean()) if isinstance(table, RaggedRows | StreamedRows) else 1.0


def load_tokens(
    cache: Cache,
    stored: StoredComparisons,
    spaces: Mapping[str, str],
    *,
    alignment: PromptAlignment = "pooled",
    device: str = "auto",
) -> TokenData:
    """Return a table's comparisons with the states of every kept token on a device, or streamed where they do not fit.

    Args:
        cache: the cache.
        stored: a comparison table of it.
        spaces: ids of the spaces by role: `prompt` and `response`, or `joint` for prompt and response in one forward.
        alignment: one vector per prompt, or its state at the response's position.
        device: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        CacheError: a space keeps no token states.
        MismatchError: texts of the table are not in the cache.
        NumericsError: a state is not finite; streamed states are checked as they are read.
    """
    where, table, joint = resolve_device(device), stored.comparisons, "joint" in spaces
    items = cache.space(spaces["joint" if joint else "response"])
    if joint:
        rows = find_rows(items, stored.joint_keys, "pairs of a prompt and a response", stored.name, cache)
        sides = stored.joint_items[1].T
    else:
        rows = find_rows(items, stored.response_keys, "responses", stored.name, cache)
        sides = np.stack([table.response_1, table.response_2]).astype(np.int64)
    span = divergence_spans(items, rows[sides[0]], rows[sides[1]])
    budget = MEMORY_SHARE * free_memory(where)
    resident = _bytes(items, rows) <= budget
    responses = load_rows(items, rows, where, resident=resident)
    left = budget - _bytes(items, rows) * resident
    prompts: Table | StateRows = TensorTable(torch.zeros(1, items.width, device=where))
    if not joint:
        space = cache.space(spaces["prompt"])
        own = find_rows(space, stored.prompt_keys, "prompts", stored.name, cache)
        if alignment == "position":
            prompts = load_rows(space, own, where, resident=_bytes(space, own) <= left)
        else:
            prompts = VectorTable(space, own, where, resident=4 * len(own) * space.width <= left)
    return TokenData(
        prompts=prompts,
        responses=responses,
        prompt=on_device(np.zeros_like(table.y) if joint else table.prompts.codes, where),
        response_1=on_device(sides[0], where),
        response_2=on_device(sides[1], where),
        user=on_device(table.users.codes, where),
        y=torch.from_numpy(table.y.astype(np.float32)).to(where),
        users=tuple(table.users.values.to_pylist()),
        span=on_device(np.stack([span.first, span.end], axis=-1), where),
        joint=joint,
    )


def _bytes(space: Space, rows: npt.NDArray[np.int64]) -> int:
    """Return the size of the token states of some rows; int8 states are handed out as float32."""
    size = 4 if space.dtype in {"float32", "int8"} else 2
    return int(space.token_lengths(rows).sum()) * space.width * size
