"""New users of every head that has mixtures, on planted tastes, whatever the users are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palcache.cache import Cache
from palcache.checkpoints import load_head
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, FitConfig, HeadConfig
from palcache.embedding.encoding import embed_comparisons
from palcache.errors import InputError
from palcache.heads import BradleyTerry
from palcache.runs.adapted import adapt_run
from palcache.runs.seen_users import list_users, suggest_run
from palcache.runs.trainings import evaluate_run, train_run
from palcache.synthetic import draw_population, population_comparisons
from tests.worlds import PLANTED_FIT, known_vectors, make_cache, rows_of

NAMES = ("a.b", "..", "a/b\\c", "line\none", "🦔🏽‍🚀", "x" * 70_000, "tab\tbed", "--user", "seen", "e\u0301")
PER_USER = 100
HEADS = {
    "angle": HeadConfig(k=2, p=4, projector="mlp0-linear-dropout0"),
    "dist": HeadConfig(k=2, p=4, projector="mlp0-linear-dropout0", score="dist"),
    "low-rank": HeadConfig(k=2, head="low-rank"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return 30 seen users in the table `seen` and ten of strange names in `new`, on known vectors."""
    population = draw_population(seed=5, users=40, k=2, d=6, p=4, concentration=0.1)
    answers = population_comparisons(population, seed=5, prompts=12, responses=31, per_user=PER_USER, temperature=0.05)
    rows = rows_of(answers, seed=5)
    encoder = known_vectors(answers.prompt_vectors, answers.response_vectors)
    cache = make_cache(tmp_path_factory.mktemp("heads") / "cache", rows[: 30 * PER_USER], encoder, name="seen")
    new = [
        {**row, "user_id": NAMES[i // PER_USER], "split": "query" if i % 2 else "support"}
        for i, row in enumerate(rows[30 * PER_USER :])
    ]
    embed_comparisons(Comparisons.from_rows(new), encoder, cache, name="new", config=EmbedConfig(dtype="float32"))
    return cache


@pytest.mark.parametrize("name", HEADS)
def test_every_head_learns_its_new_users(cache: Cache, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    train_run(cache, run, comparisons="seen", head=HEADS[name], config=replace(PLANTED_FIT, epochs=8), device="cpu")
    before = (run / "head.safetensors").read_bytes()
    curves = {
        method: adapt_run(run, cache, "new", method=method, shots=(PER_USER // 2,), draws=1, device="cpu").points
        for method in ("map", "published", "generic")
    }
    last = {method: points[-1].evaluation.accuracy["micro"].value for method, points in curves.items()}
    if name != "low-rank":  # the tastes of this world depend on prompts, which linear rewards do not read
        assert last["map"] > last["generic"] + 0.02
        assert last["map"] > last["published"]
    assert adapt_run(run, cache, "new", shots=(0,), keep_users=True, device="cpu").saved == len(NAMES)
    assert (run / "head.safetensors").read_bytes() == before
    adapted = {user.user: user for user in list_users(run) if user.kind == "adapted"}
    assert set(adapted) == set(NAMES)
    assert {user.comparisons for user in adapted.values()} == {
        PER_USER // 2
    }  # the support alone: the query stays unseen
    assert len(suggest_run(run, cache, "new", user="line\none", count=3, device="cpu")) == 3
    evaluated = evaluate_run(run, cache, comparisons="new", split="query", device="cpu")
    assert evaluated["head"].accuracy["micro"].value == pytest.approx(last["map"], abs=1e-9)


def test_no_user_can_be_added_to_a_head_without_mixtures(cache: Cache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(
        cache, run, comparisons="seen", head=HeadConfig(head="pca", k=3), config=FitConfig(epochs=1), device="cpu"
    )
    with pytest.raises(InputError, match="A PrincipalDirections head has no mixtures, so that no user can be added"):
        load_head(run / "head.safetensors").with_adapted(("new",), torch.zeros(1, 3))
    blind = load_head(run / "user_blind.safetensors")
    assert isinstance(blind.shape, BradleyTerry)
    more = blind.with_adapted(("new",), torch.zeros(1, 1))
    assert more.users[-1] == "new"
    np.testing.assert_array_equal(more.mixtures.numpy(), 1)
