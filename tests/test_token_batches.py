"""Ragged token states become dense ones, and spans come from ids and real lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palcache.errors import InputError
from palcache.token_batches import RaggedRows, TokenData, dense_rows, last_values, spans
from tests.building import make_token_data

texts_of = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=7)


def ragged(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0, *map(len, texts)])
    return torch.tensor([value for text in texts for value in text], dtype=torch.int64), lengths.cumsum(0)


@given(texts_of)
def test_positions_past_the_end_hold_the_last_state(texts: list[list[int]]) -> None:
    values, offsets = ragged(texts)
    dense = dense_rows(values, offsets, torch.arange(len(texts)))
    last = last_values(values, offsets, torch.arange(len(texts))) if len(values) else dense[:, -1]
    for text, row, end in zip(texts, dense.tolist(), last.tolist(), strict=True):
        assert row == (text + [text[-1]] * (len(row) - len(text)) if text else [0] * len(row))
        assert end == (text[-1] if text else 0)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6)), min_size=1)
)
def test_spans_against_a_loop(pairs: list[tuple[list[int], list[int]]]) -> None:
    left, right = ([pair[i] for pair in pairs] for i in range(2))
    dense = [dense_rows(*ragged(side), torch.arange(len(pairs)), 6) for side in (left, right)]
    lengths = [torch.tensor([len(text) for text in side]) for side in (left, right)]
    first, end = spans(dense[0], dense[1], lengths[0], lengths[1])
    for i, (a, b) in enumerate(pairs):
        longer = max(len(a), len(b))
        want = next((t for t in range(longer) if t >= min(len(a), len(b)) or a[t] != b[t]), longer)
        assert (int(first[i]), int(end[i])) == (want, longer)


def test_batches_hold_what_the_texts_hold() -> None:
    data = make_token_data()
    batch = data.batch(torch.tensor([3, 7]))
    for row, at in enumerate((3, 7)):
        begin, end = data.responses.offsets[data.response_1[at]], data.responses.offsets[data.response_1[at] + 1]
        own = data.responses.values[begin:end]
        assert torch.equal(batch.left[row, : len(own)], own)
        assert torch.equal(batch.left[row, len(own) :], own[-1:].expand(batch.left.shape[1] - len(own), -1))
        prompt = data.prompts.values[data.prompts.offsets[data.prompt[at] + 1] - 1]
        assert torch.equal(batch.prompts[row], prompt)
    assert batch.prompts.shape == (2, 7)


def test_positions_of_prompts() -> None:
    data = make_token_data()
    aligned = TokenData(
        data.prompts, data.responses, data.prompt, data.response_1, data.response_2, data.user, data.y, data.users,
        alignment="position",
    )  # fmt: skip
    batch = aligned.batch(torch.arange(5))
    assert batch.prompts.shape == batch.left.shape


def test_users_and_rows_are_renumbered() -> None:
    data = make_token_data(users=4).with_users(["user.2", "user.0"])
    assert sorted(set(data.user.tolist())) == [-1, 0, 1]
    assert len(data.take(torch.tensor([1, 4]))) == 2


def test_neither_ids_nor_spans() -> None:
    data = make_token_data()
    bare = RaggedRows(data.responses.values, data.responses.offsets)
    without = TokenData(
        data.prompts, bare, data.prompt, data.response_1, data.response_2, data.user, data.y, data.users
    )
    with pytest.raises(InputError, match="no token ids, and no spans"):
        without.batch(torch.arange(2))
