"""Prototypes are told apart by the comparisons that each decides, and the order is that of a float64 computation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palcache.checkpoints import TrainedHead
from palcache.comparisons import Comparisons
from palcache.configs import HeadConfig
from palcache.errors import CacheError
from palcache.evaluation import predict_margins
from palcache.heads import build_head
from palcache.runs import prototypes
from palcache.runs.inputs import RunSplit
from palcache.runs.prototypes import (
    CLIPPED,
    PROTOTYPES,
    Prototypes,
    clip,
    describe_prototypes,
    has_prototypes,
    leads,
    load_prototypes,
    save_prototypes,
)
from palcache.tensors import PreferenceData
from tests.building import make_data
from tests.worlds import random_head

N, D = 60, 7


@pytest.fixture(scope="module")
def world() -> tuple[Comparisons, PreferenceData]:
    """Return comparisons and their vectors: five users, six prompts, eleven responses."""
    data = make_data(N, 5, D, prompts=6, responses=11)
    rows = [
        {"user_id": f"user.{u}", "prompt": f"prompt {p}", "response_1": f"r {a}", "response_2": f"r {b}", "y": int(y)}
        for u, p, a, b, y in zip(
            *(column.tolist() for column in (data.user, data.prompt, data.response_1, data.response_2, data.y)),
            strict=True,
        )
    ]
    return Comparisons.from_rows(rows), data


def alone(head: TrainedHead, data: PreferenceData) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the margins of every prototype by itself: those of a head whose users all have that prototype."""
    out = []
    for j in range(head.shape.k):
        logits = torch.full((head.shape.users, head.shape.k), -1e9)
        logits[:, j] = 0
        out.append(predict_margins(replace(head, parameters={**head.parameters, "user.logits": logits}), data))
    return np.stack(out, 1)


def test_decisions_are_those_of_the_largest_leads(world: tuple[Comparisons, PreferenceData]) -> None:
    comparisons, data = world
    head = random_head(data.users, d=D, k=3)
    rows = 10 * np.arange(N)
    found = describe_prototypes(head, RunSplit(comparisons, data, rows))
    margins = alone(head, data)
    assert found.examined == N
    for j, decisions in enumerate(found.decisions):
        lead = np.sign(margins[:, j]) * (margins[:, j] - np.delete(margins, j, 1).mean(1))
        assert [d.lead for d in decisions] == sorted((d.lead for d in decisions), reverse=True)
        assert decisions[0].lead == pytest.approx(lead.max(), rel=1e-5)
        assert len({(d.prompt, *sorted((d.preferred, d.other))) for d in decisions}) == len(decisions)
        for decision in decisions:
            at = decision.row // 10
            sign = np.sign(margins[at, j])
            assert decision.lead == pytest.approx(lead[at], rel=1e-5)
            assert decision.margins == pytest.approx(sign * margins[at], rel=1e-4, abs=1e-5)
            assert decision.margins[j] > 0
            sides = [int(column[at]) for column in (data.response_1, data.response_2)]
            assert (decision.other, decision.preferred) == tuple(f"r {i}" for i in sides[:: int(sign)])
            assert decision.prompt == f"prompt {int(data.prompt[at])}"


def test_agreement_and_cosine_say_how_alike_prototypes_are(world: tuple[Comparisons, PreferenceData]) -> None:
    comparisons, data = world
    head = random_head(data.users, d=D, k=3)
    found = describe_prototypes(head, RunSplit(comparisons, data, np.arange(N)))
    signs = np.sign(alone(head, data))
    expected = [[(signs[:, i] == signs[:, j]).mean() for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(found.agreement, expected)
    assert found.cosine is not None
    assert np.diag(found.cosine) == pytest.approx(1)
    np.testing.assert_allclose(found.cosine, np.transpose(found.cosine), atol=1e-12)
    g = head.shape.project_prompts(head.parameters, data.prompts.take(data.prompt)).double()  # type: ignore[attr-defined]
    assert found.cosine[0][2] == pytest.approx(float(torch.cosine_similarity(g[0], g[2], dim=-1).mean()), rel=1e-6)


@pytest.mark.parametrize("kind", ["pal-a", "low-rank", "pca"])
def test_every_head_of_prototypes_is_described(world: tuple[Comparisons, PreferenceData], kind: str) -> None:
    comparisons, data = world
    config = HeadConfig.from_mapping({"head": kind, "k": 2, "p": 4, "projector": "mlp1-relu-dropout1"})
    shape = build_head(config, d=D, users=5)
    head = TrainedHead(shape, shape.initial(torch.Generator().manual_seed(1)), data.users, {})
    assert has_prototypes(shape)
    found = describe_prototypes(head, RunSplit(comparisons, replace(data, joint=shape.joint), np.arange(N)))
    assert (found.cosine is not None) == (kind == "pal-a")
    assert len(found.decisions) == 2


@pytest.mark.parametrize("kind", ["bradley-terry", "per-user"])
def test_heads_without_prototypes_have_nothing_to_describe(kind: str) -> None:
    config = HeadConfig.from_mapping({"head": kind, "projector": "identity"})
    assert not has_prototypes(build_head(config, d=D, users=5))


def test_a_single_prototype_leads_by_its_margin() -> None:
    assert leads(np.array([[-2.0], [1.0]]), 0).tolist() == [2.0, 1.0]
    assert leads(np.array([[-2.0, 1.0, 2.0]]), 0).tolist() == [3.5]


def test_large_splits_are_thinned_evenly(
    world: tuple[Comparisons, PreferenceData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototypes, "EXAMINED", 7)
    comparisons, data = world
    found = describe_prototypes(random_head(data.users, d=D), RunSplit(comparisons, data, np.arange(N)))
    assert found.examined == 7
    assert {d.row for of_one in found.decisions for d in of_one} <= {0, 9, 19, 29, 39, 49, 59}


def test_long_texts_are_clipped() -> None:
    assert clip("a" * CLIPPED) == "a" * CLIPPED
    assert clip("ab " * CLIPPED)[-4:] == "b ab…"[-4:]
    assert len(clip("x" * (CLIPPED + 1))) == CLIPPED


def test_prototypes_come_back_as_they_were(world: tuple[Comparisons, PreferenceData], tmp_path: Path) -> None:
    comparisons, data = world
    before = describe_prototypes(random_head(data.users, d=D), RunSplit(comparisons, data, np.arange(N)))
    save_prototypes(tmp_path / PROTOTYPES, before)
    assert load_prototypes(tmp_path / PROTOTYPES) == before
    assert load_prototypes(tmp_path / "none.json") is None
    bare = replace(before, cosine=None)
    assert Prototypes.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare


def test_damaged_prototypes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / PROTOTYPES
    path.write_text('{"format": "palcache-prototypes", "version": 2}')
    with pytest.raises(CacheError, match="is of format palcache-prototypes version 2; expected palcache-prototypes 1"):
        load_prototypes(path)
    path.write_text('{"format": "palcache-prototypes", "version": 1}')
    with pytest.raises(CacheError, match=r"prototypes\.json is damaged \(KeyError: .*; train the head again"):
        load_prototypes(path)
