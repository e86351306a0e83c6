"""The batched posterior is the slow one, one user at a time; its regions cover; its error falls as theory says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from palcache.users.padded_users import contrasts, coordinates, padded
from palcache.users.posteriors import Gaussian, Objective, maximum_a_posteriori, posteriors_at
from palcache.users.priors import fit_prior
from palcache.users.reductions import ReducedComparisons
from palcache.users.regions import credible_regions, excess_at
from tests.planted import coordinates_of, planted, reduced_of, standard_prior


def negative_log_posterior(
    z: npt.NDArray[np.float64], reduced: ReducedComparisons, user: int, prior: Gaussian
) -> float:
    """Return it by its definition in numpy, comparison by comparison."""
    away = z - prior.mean.numpy()
    total = float(away @ np.linalg.inv(prior.covariance.numpy()) @ away) / 2
    theta = contrasts(reduced.k).numpy() @ z
    w = np.exp(theta - theta.max())
    w /= w.sum()
    for row in np.flatnonzero(reduced.user.numpy() == user):
        gram = reduced.grams[reduced.prompt[row]].numpy()
        margin = float(reduced.products[row, 0].numpy() @ w) / math.sqrt(w @ gram @ w)
        total += math.log1p(math.exp(-abs(margin))) + max(margin, 0) - margin * (float(reduced.y[row]) + 1) / 2
    return total


@pytest.mark.parametrize("k", [2, 3, 5])
def test_map_is_a_slow_optimisation_of_each_user(k: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    reduced = reduced_of(*planted(users=12, k=k, per_user=9, seed=k))
    prior = Gaussian(torch.linspace(-0.3, 0.4, k - 1, dtype=torch.float64), standard_prior(k, 1.7).covariance)
    found = maximum_a_posteriori(reduced, prior)
    for user in range(12):
        slow = optimize.minimize(
            negative_log_posterior, prior.mean.numpy(), (reduced, user, prior), method="BFGS", options={"gtol": 1e-8}
        )
        np.testing.assert_allclose(found.mean[user].numpy(), slow.x, atol=1e-4)
        mixture = np.exp(contrasts(k).numpy() @ slow.x)
        np.testing.assert_allclose(found.mixtures[user].numpy(), mixture / mixture.sum(), atol=1e-4)


def test_gradient_and_hessian_are_autograds() -> None:
    reduced = reduced_of(*planted(users=2, k=4, per_user=6))
    chunk = Objective.of(reduced, torch.arange(12).reshape(2, 6), standard_prior(4))
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = chunk.expand(z)
    for user in range(2):
        one = chunk.take(torch.tensor([user]))

        def loss(point: torch.Tensor, one: Objective = one) -> torch.Tensor:
            return one.expand(point[None]).loss[0]

        torch.testing.assert_close(found.gradient[user], torch.autograd.functional.jacobian(loss, z[user]))  # type: ignore[no-untyped-call]
        torch.testing.assert_close(found.observed[user], torch.autograd.functional.hessian(loss, z[user]))  # type: ignore[no-untyped-call]


def ragged() -> ReducedComparisons:
    """Return users with 0, 1, ... comparisons."""
    reduced = reduced_of(*planted(users=9, k=3, per_user=8))
    place = torch.arange(len(reduced)) % 8
    return reduced.take(torch.nonzero(place < reduced.user)[:, 0])


def test_a_batch_is_each_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced, prior = ragged(), standard_prior(3)
    together = maximum_a_posteriori(reduced, prior)
    for user in range(9):
        alone = maximum_a_posteriori(reduced.take(torch.nonzero(reduced.user == user)[:, 0]), prior)
        torch.testing.assert_close(together.mean[user], alone.mean[user], rtol=0, atol=1e-9)
        torch.testing.assert_close(together.covariance[user], alone.covariance[user], rtol=0, atol=1e-9)
    torch.testing.assert_close(together.mean[0], prior.mean)  # no comparisons: the prior
    monkeypatch.setattr("palcache.users.posteriors.CELLS", 50)
    chunked = maximum_a_posteriori(reduced, prior)
    torch.testing.assert_close(together.mean, chunked.mean, rtol=0, atol=1e-9)


def test_order_of_comparisons_does_not_matter() -> None:
    reduced, prior = ragged(), standard_prior(3)
    order = torch.randperm(len(reduced), generator=torch.Generator().manual_seed(0))
    shuffled = maximum_a_posteriori(reduced.take(order), prior)
    torch.testing.assert_close(maximum_a_posteriori(reduced, prior).mean, shuffled.mean, rtol=0, atol=1e-9)


def test_a_user_who_contradicts_himself_stays_near_the_prior() -> None:
    reduced = reduced_of(*planted(users=1, k=3, per_user=40))
    rows = torch.arange(40).repeat(2)
    twice = reduced.take(rows)
    opposite = replace(twice, y=torch.cat([reduced.y, -reduced.y]))
    undecided = maximum_a_posteriori(opposite, standard_prior(3))
    decided = maximum_a_posteriori(twice, standard_prior(3))
    assert bool(torch.isfinite(undecided.covariance).all())
    # Both answers of a pair are likeliest where margins are small, whatever side they are on.
    indifferent = reduced.margins(undecided.mixtures).abs().mean()
    assert float(indifferent) < float(reduced.margins(decided.mixtures).abs().mean())


def test_a_tie_counts_one_half_for_each_side() -> None:
    reduced = reduced_of(*planted(users=1, k=2, per_user=1))
    tie = replace(reduced, y=reduced.y * 0)
    prior = standard_prior(2)
    halves = negative_log_posterior(np.zeros(1), tie, 0, prior)
    both = [negative_log_posterior(np.zeros(1), replace(reduced, y=reduced.y * 0 + y), 0, prior) for y in (-1, 1)]
    chunk = Objective.of(tie, torch.tensor([[0]]), prior)
    assert halves == pytest.approx(float(np.mean(both)))
    assert float(chunk.expand(torch.zeros(1, 1, dtype=torch.float64)).loss) == pytest.approx(halves)


def test_padding_covers_every_row_once() -> None:
    user = torch.tensor([3, 0, 3, 5, 0, 3, 1])
    counts = torch.bincount(user, minlength=7)
    chunks = padded(user, counts, cells=4)
    rows = torch.cat([r[r >= 0] for _, r in chunks])
    assert sorted(rows.tolist()) == list(range(7))
    for users, at in chunks:
        for u, row in zip(users.tolist(), at, strict=True):
            assert (user[row[row >= 0]] == u).all()
    assert sorted(torch.cat([u for u, _ in chunks]).tolist()) == [0, 1, 3, 5]


def test_basis_is_orthonormal_and_gauge_free() -> None:
    basis = contrasts(5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(coordinates(logits), coordinates(logits + 7))
    torch.testing.assert_close(torch.softmax(coordinates(logits) @ basis.T, 1), torch.softmax(logits, 1))


def test_error_falls_at_the_rate_of_the_theory() -> None:
    """The mean squared error in z is the mean posterior variance, and falls as 1 / n (Bernstein and von Mises)."""
    errors = {}
    for n in (100, 400, 1600):
        population, answers = planted(users=500, k=3, per_user=n, seed=5)
        reduced = reduced_of(population, answers)
        found = maximum_a_posteriori(reduced, standard_prior(3))
        squared = (coordinates_of(population.mixtures) - found.mean).square().sum(1)
        variance = found.covariance.diagonal(dim1=1, dim2=2).sum(1)
        errors[n] = float(squared.median())
        assert float((squared / variance).median()) == pytest.approx(0.7, abs=0.25)  # median of chi2(2) / 2 is 0.69
    assert errors[400] / errors[1600] == pytest.approx(4, rel=0.3)
    assert errors[100] / errors[1600] == pytest.approx(16, rel=0.3)


@pytest.mark.parametrize(("k", "n"), [(2, 5), (2, 50), (3, 10), (3, 200), (5, 20)])
def test_95_percent_regions_cover_93_to_97_percent(k: int, n: int) -> None:
    population, answers = planted(users=3000 if n <= 20 else 1500 if n <= 50 else 800, k=k, per_user=n, seed=11)
    reduced, prior = reduced_of(population, answers), standard_prior(k)
    found = maximum_a_posteriori(reduced, prior)
    regions = credible_regions(reduced, prior, found)
    inside = excess_at(reduced, prior, found, coordinates_of(population.mixtures)) <= regions.limit
    assert 0.93 <= float(inside.double().mean()) <= 0.97
    away = (torch.from_numpy(population.mixtures) - regions.mean) / regions.deviation
    assert float(away.square().mean().sqrt()) == pytest.approx(1, abs=0.1)


def test_a_user_without_comparisons_has_the_priors_region() -> None:
    reduced = reduced_of(*planted(users=2, k=3, per_user=4))
    only = reduced.take(torch.nonzero(reduced.user == 1)[:, 0])
    prior = standard_prior(3)
    regions = credible_regions(only, prior, maximum_a_posteriori(only, prior), samples=8192)
    assert float(regions.limit[0]) == pytest.approx(5.991, rel=0.08)  # the 95 % point of chi2(2)
    torch.testing.assert_close(regions.mean[0], torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.02, rtol=0)


def test_covariance_at_the_mode_is_the_same() -> None:
    reduced, prior = ragged(), standard_prior(3)
    found = maximum_a_posteriori(reduced, prior)
    torch.testing.assert_close(posteriors_at(reduced, prior, found.mean).covariance, found.covariance)


def test_samples_have_the_posteriors_moments() -> None:
    found = maximum_a_posteriori(ragged(), standard_prior(3)).take(torch.tensor([2, 7]))
    draws = found.samples(40_000)
    assert draws.shape == (2, 40_000, 3)
    z = draws.log() @ contrasts(3)
    torch.testing.assert_close(z.mean(1), found.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.stack([torch.cov(part.T) for part in z]), found.covariance, atol=0.03, rtol=0.05)


def test_prior_finds_the_population_it_was_drawn_from() -> None:
    population, answers = planted(users=1500, k=3, per_user=30, seed=2, variance=1.5)
    prior = fit_prior(reduced_of(population, answers))
    assert bool((prior.mean.abs() < 0.15).all())
    # Modes and Laplace's covariances understate the spread of skew posteriors: the prior is narrower than the truth, not wider.
    variances = torch.linalg.eigvalsh(prior.covariance)
    assert 0.5 * 1.5 < float(variances[0]) <= float(variances[1]) < 1.05 * 1.5


def test_prior_of_nobody_is_the_start() -> None:
    reduced = reduced_of(*planted(users=2, k=3, per_user=4))
    prior = fit_prior(reduced.take(torch.empty(0, dtype=torch.int64)))
    assert prior.mean.tolist() == [0, 0]
    torch.testing.assert_close(prior.covariance, 4 * torch.eye(2, dtype=torch.float64))
