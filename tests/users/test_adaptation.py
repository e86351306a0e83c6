"""Every method of adaptation: each user gets what that user alone would get, and nobody's head is touched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palcache.errors import InputError
from palcache.users.adaptation import METHODS, MethodName, Population, Published, adapt_users, posteriors_of
from palcache.users.posteriors import maximum_a_posteriori
from palcache.users.reductions import ReducedComparisons
from palcache.users.suggestions import information_factors, suggest
from tests.planted import planted, reduced_of, standard_prior

K = 3


def world(users: int = 7, per_user: int = 9) -> tuple[ReducedComparisons, Population]:
    """Return new users with 0, 1, ... comparisons, and a population of others."""
    population, answers = planted(users=users, k=K, per_user=per_user)
    reduced = reduced_of(population, answers)
    seen, _ = planted(users=5, k=K, per_user=1, seed=50)
    place = torch.arange(len(reduced)) % per_user
    ragged = reduced.take(torch.nonzero(place < reduced.user)[:, 0])
    return ragged, Population(torch.from_numpy(seen.mixtures), standard_prior(K))


@pytest.mark.parametrize("method", list(METHODS))
def test_each_user_gets_what_that_user_alone_would_get(method: MethodName) -> None:
    reduced, population = world()
    together = adapt_users(reduced, population, method, seed=3)
    torch.testing.assert_close(together.sum(1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(together[0], population.generic)  # no comparisons: the population's own
    for user in range(7):
        rows = torch.nonzero(reduced.user == user)[:, 0]
        one = replace(reduced.take(rows), user=torch.zeros(len(rows), dtype=torch.int64), users=(reduced.users[user],))
        torch.testing.assert_close(adapt_users(one, population, method, seed=3)[0], together[user], rtol=0, atol=1e-9)


def test_published_is_torchs_adamw() -> None:
    """One user with as many comparisons as a batch: the order within a batch does not matter."""
    reduced, population = world(users=5, per_user=9)
    rows = torch.nonzero(reduced.user == 4)[:, 0]
    only = replace(reduced.take(rows), user=torch.zeros(4, dtype=torch.int64), users=("somebody",))
    found = adapt_users(only, population, "published", seed=9)
    frozen = Published(epochs=0)(only, population, seed=9)
    weights = frozen.log().requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=5e-3, weight_decay=0.0)
    for _ in range(20):
        margins = only.margins(torch.softmax(weights, dim=1))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(margins, (only.y + 1) / 2)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(found, torch.softmax(weights.detach(), dim=1), rtol=0, atol=1e-6)


def test_likelihood_averages_seen_users_by_how_well_they_explain() -> None:
    reduced, population = world()
    found = adapt_users(reduced, population, "likelihood")
    for user in range(1, 7):
        rows = torch.nonzero(reduced.user == user)[:, 0]
        part = reduced.take(rows)
        logs = []
        for mixture in population.mixtures:
            margins = part.margins(mixture.expand(7, -1)).numpy()
            logs.append(-np.logaddexp(0, -margins * part.y.numpy()).sum())
        weight = np.exp(np.array(logs) - max(logs))
        np.testing.assert_allclose(found[user].numpy(), weight @ population.mixtures.numpy() / weight.sum(), atol=1e-12)


def test_uncertainty_of_any_method() -> None:
    reduced, population = world()
    found = adapt_users(reduced, population, "likelihood")
    around = posteriors_of(reduced, population, found)
    torch.testing.assert_close(around.mixtures, found, rtol=0, atol=1e-5)
    assert bool((torch.linalg.eigvalsh(around.covariance) > 0).all())


def test_one_prototype_is_refused() -> None:
    reduced, population = world()
    one = replace(reduced, k=1, products=reduced.products[..., :1], grams=reduced.grams[:, :1, :1])
    with pytest.raises(InputError, match="k = 1 prototype, one reward for all users, so there is nothing to adapt"):
        adapt_users(one, population)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="Got the method 'guess'; expected one of map, published, likelihood, generic"):
        adapt_users(*world(), method="guess")  # type: ignore[arg-type]


def test_information_is_the_variance_of_the_score() -> None:
    """By its definition: E[(d log P(y) / dz)^2], by differences, at each of the posterior's draws."""
    reduced = reduced_of(*planted(users=1, k=2, per_user=3))
    user = maximum_a_posteriori(reduced, standard_prior(2))
    found = information_factors(reduced, user)[..., 0].square().numpy()
    z = torch.log(user.samples(64)[0]) @ torch.tensor([[0.5**0.5], [-(0.5**0.5)]], dtype=torch.float64)

    def margins(at: torch.Tensor) -> torch.Tensor:
        w = torch.softmax(torch.cat([at, -at], dim=1) * 0.5**0.5, dim=1)
        return torch.stack([reduced.margins(row[None]) for row in w])

    slope = (margins(z + 1e-5) - margins(z - 1e-5)) / 2e-5
    p = torch.sigmoid(margins(z))
    np.testing.assert_allclose(found, (slope**2 * p * (1 - p)).numpy(), rtol=1e-6)


def test_suggestions_do_not_look_at_answers_and_never_repeat() -> None:
    reduced = reduced_of(*planted(users=1, k=K, per_user=12))
    user = maximum_a_posteriori(reduced.take(torch.arange(2)), standard_prior(K))
    found = suggest(reduced, user, 20)
    assert sorted(s.row for s in found) == list(range(12))
    assert [s.gain for s in found] == sorted((s.gain for s in found), reverse=True)
    assert suggest(replace(reduced, y=-reduced.y), user, 20) == found
    with pytest.raises(InputError, match="Got a count of 0 and 1 users; expected at least one suggestion"):
        suggest(reduced, user, 0)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_suggested_support_reaches_random_supports_accuracy_with_half_the_comparisons(k: int) -> None:
    """Asked one at a time: 4 against 8 random ones and 8 against 16, in the mean of two populations."""
    found = np.mean([_suggested_and_random(k, seed) for seed in range(2)], axis=0)
    assert (found[0] >= found[1]).all(), found


def _suggested_and_random(k: int, seed: int) -> list[list[float]]:
    """Return accuracy on the truth after 4 and 8 suggested comparisons, and after 8 and 16 random ones."""
    users, pool, query = 40, 150, 150
    population, answers = planted(users=users, k=k, per_user=pool + query, seed=seed)
    reduced, prior = reduced_of(population, answers), standard_prior(k)
    truth = reduced.margins(torch.from_numpy(population.mixtures)).sign()
    rows = torch.arange(len(reduced)).reshape(users, -1)
    asked = rows[:, pool:].reshape(-1)

    def accuracy(support: torch.Tensor) -> float:
        mixtures = maximum_a_posteriori(reduced.take(support.reshape(-1)), prior).mixtures
        return float((reduced.take(asked).margins(mixtures).sign() == truth[asked]).double().mean())

    chosen = torch.empty(users, 0, dtype=torch.int64)
    suggested = []
    for step in range(1, 9):
        known = maximum_a_posteriori(reduced.take(chosen.reshape(-1)), prior)
        best = []
        for user in range(users):
            left = rows[user, :pool][~torch.isin(rows[user, :pool], chosen[user])]
            best.append(left[suggest(reduced.take(left), known.take(torch.tensor([user])), 1)[0].row])
        chosen = torch.cat([chosen, torch.stack(best).unsqueeze(1)], dim=1)
        suggested += [accuracy(chosen)] if step in {4, 8} else []
    return [suggested, [accuracy(rows[:, :n]) for n in (8, 16)]]


def test_a_list_is_greedy_and_a_large_pool_is_shortlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains by their definition: the mean rise of log-determinants over draws, each entry allowing for those before."""
    reduced = reduced_of(*planted(users=1, k=K, per_user=30))
    user = maximum_a_posteriori(reduced.take(torch.arange(3)), standard_prior(K))
    factors, precision = information_factors(reduced, user), torch.linalg.inv(user.covariance)
    now = precision.expand(len(factors), -1, -1)
    taken: list[int] = []
    for found in suggest(reduced, user, 4):
        more = now.unsqueeze(1) + factors.unsqueeze(3) * factors.unsqueeze(2)
        gains = (torch.logdet(more) - torch.logdet(now).unsqueeze(1)).mean(0) / 2
        gains[taken] = -1
        assert found.row == int(gains.argmax())
        assert found.gain == pytest.approx(float(gains.max()))
        taken, now = [*taken, found.row], more[:, found.row]
    whole = suggest(reduced, user, 4)
    monkeypatch.setattr("palcache.users.suggestions.SHORTLIST", 20)
    assert [s.row for s in suggest(reduced, user, 4)] == [s.row for s in whole]
