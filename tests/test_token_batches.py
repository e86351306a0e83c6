"""Batches of tokens hold the positions of spans, each state once, and nothing of other texts or of padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palcache.configs import HeadConfig
from palcache.heads import build_head
from palcache.noises import Noise
from palcache.spans import ragged_spans
from palcache.token_batches import TokenBatch, TokenData
from palcache.token_states import LastStates, RaggedRows, take_states
from tests.building import all_tokens, generator, make_token_data

Texts = list[list[int]]
texts_of = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=2, max_size=7)


def ragged(texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and offsets; each value says where it stands."""
    lengths = torch.tensor([0, *map(len, texts)])
    values = [[100.0 * row + at + 1, float(value)] for row, text in enumerate(texts) for at, value in enumerate(text)]
    return torch.tensor(values).reshape(-1, 2), lengths.cumsum(0)


def data_of(texts: Texts, pairs: list[tuple[int, int]], *, aligned: bool = False) -> TokenData:
    values, offsets = ragged(texts)
    left, right = (np.array([pair[i] for pair in pairs]) for i in range(2))
    spans = ragged_spans(values[:, 1].long().numpy(), offsets.numpy(), left, right)
    rows, n = RaggedRows(values, offsets), len(pairs)
    return TokenData(
        rows if aligned else LastStates(rows), rows, torch.zeros(n, dtype=torch.int64), torch.from_numpy(left),
        torch.from_numpy(right), torch.zeros(n, dtype=torch.int64), torch.ones(n), ("u",),
        torch.stack([torch.from_numpy(spans.first), torch.from_numpy(spans.end)], -1),
    )  # fmt: skip


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6)), min_size=1)
)
def test_spans_against_a_loop(pairs: list[tuple[list[int], list[int]]]) -> None:
    values, offsets = ragged([text for pair in pairs for text in pair])
    at = np.arange(len(pairs))
    spans = ragged_spans(values[:, 1].long().numpy(), offsets.numpy(), 2 * at, 2 * at + 1)
    for i, (a, b) in enumerate(pairs):
        longer = max(len(a), len(b))
        want = next((t for t in range(longer) if t >= min(len(a), len(b)) or a[t] != b[t]), longer)
        assert (int(spans.first[i]), int(spans.end[i])) == (want, longer)


@given(texts_of, st.data(), st.booleans())
def test_batches_against_a_loop(texts: Texts, data: st.DataObject, aligned: bool) -> None:
    """Every position of every span, in order: left and right state, prompt, rank; past its end a text's last state."""
    numbers = st.integers(0, len(texts) - 1)
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5))
    batch = all_tokens(data_of(texts, pairs, aligned=aligned))
    p = batch.pairs
    rows = zip(batch.comparison.tolist(), batch.rank.tolist(), p.responses[p.response_1].tolist(),
               p.responses[p.response_2].tolist(), strict=True)  # fmt: skip
    prompts = p.prompts[p.prompt].tolist()

    def state(text: int, at: int) -> list[float]:
        at = min(at, len(texts[text]) - 1)
        return [100.0 * text + at + 1, float(texts[text][at])] if texts[text] else [0.0, 0.0]

    want, met = [], []
    for i, (a, b) in enumerate(pairs):
        short, end = sorted((len(texts[a]), len(texts[b])))
        first = next((t for t in range(short) if texts[a][t] != texts[b][t]), short if short < end else end)
        want += [(i, t - first + 1, state(a, t), state(b, t)) for t in range(first, max(end, first + 1))]
        met += [state(0, t if aligned else len(texts[0])) for t in range(first, max(end, first + 1))][
            : None if aligned else 1
        ]
        assert int(batch.count[i]) == end - first
    assert list(rows) == want
    assert prompts == met
    there = p.responses[p.responses[:, 0] > 0]
    assert len(torch.unique(there, dim=0)) == len(there), "each state is there once"


def test_a_dense_batch_is_the_ragged_one() -> None:
    texts = [[0, 1, 2, 1], [0, 1, 1, 2], [2, 1, 0, 0], [2, 2, 2, 2]]
    data = data_of(texts, [(0, 1), (2, 3), (1, 1)])
    states = data.responses.read(torch.arange(4), torch.zeros(4).long(), torch.full((4,), 4)).reshape(4, 4, 2)
    ragged_batch = all_tokens(data)
    for whole in (False, True):
        dense = TokenBatch.from_dense(
            states[data.response_1],
            states[data.response_2],
            torch.zeros(3, 2),
            data.span,
            data.user,
            data.y,
            whole=whole,
        )
        inside = (dense.rank >= 1) & (dense.rank <= dense.count[dense.comparison])
        counted = (ragged_batch.rank >= 1) & (ragged_batch.rank <= ragged_batch.count[ragged_batch.comparison])
        for side in ("response_1", "response_2"):
            got = dense.pairs.responses[getattr(dense.pairs, side)][inside]
            assert torch.equal(got, ragged_batch.pairs.responses[getattr(ragged_batch.pairs, side)][counted])
        assert len(dense.rank) == (12 if whole else 2 + 3 + 1)


def test_rewards_are_served_on_last_states() -> None:
    data = data_of([[0, 1], [2], [], [1, 1, 1]], [(0, 1), (2, 3)])
    batch = data.served().batch(torch.arange(2))
    assert batch.responses[batch.response_1].tolist() == [[2.0, 1.0], [0.0, 0.0]]
    assert batch.responses[batch.response_2].tolist() == [[101.0, 2.0], [303.0, 1.0]]
    assert not data.served().streamed
    aligned = data_of([[0, 1], [2]], [(0, 1)], aligned=True).served().batch(torch.arange(1))
    assert aligned.prompts.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    values, offsets = ragged([[1], [], [2, 0]])
    taken = take_states(
        RaggedRows(values.to(dtype), offsets), torch.tensor([2, 1]), torch.tensor([1, 0]), torch.tensor([2, 1])
    )
    assert taken.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert taken.tolist() == [[202.0, 0.0], [0.0, 0.0]]


def test_users_and_rows_are_renumbered() -> None:
    data = make_token_data(users=4).with_users(["user.2", "user.0"])
    assert sorted(set(data.user.tolist())) == [-1, 0, 1]
    part = data.take(np.array([1, 4]))
    assert len(part) == 2
    assert torch.equal(part.span, data.span[[1, 4]])
    assert [len(batch.y) for batch in data.batches(5)] == [5, 5, 2]
    assert (data.alignment, make_token_data(aligned=True).alignment) == ("pooled", "position")


def test_comparisons_do_not_see_each_other() -> None:
    """A batch's part of a comparison is what the comparison is alone, noise included."""
    data = make_token_data(9, aligned=True)
    whole = all_tokens(data)
    for i in range(9):
        alone = data.batch(torch.tensor([i]))
        mine = whole.comparison == i
        for side in ("response_1", "response_2"):
            states = whole.pairs.responses[getattr(whole.pairs, side)][mine]
            assert torch.equal(states, alone.pairs.responses[getattr(alone.pairs, side)])
        assert torch.equal(whole.pairs.prompts[whole.pairs.prompt][mine], alone.pairs.prompts[alone.pairs.prompt])
    head = build_head(HeadConfig(p=4, projector="mlp1-gelu-dropout5"), d=7, users=4)
    parameters, noise = head.initial(generator(0)), Noise.of(3)
    together = head.margins(parameters, whole.pairs, noise=noise)
    for i in range(9):
        margins = head.margins(parameters, data.batch(torch.tensor([i])).pairs, noise=noise)
        torch.testing.assert_close(together[whole.comparison == i], margins, msg=str(i))
    calm = head.margins(parameters, whole.pairs)
    assert not torch.allclose(together, calm), "there is noise"
