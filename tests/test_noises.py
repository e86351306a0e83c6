"""Noise is uniform and independent across keys, sites, rows and columns, and a function of these alone."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch

from palcache.noises import Dropout, Noise, Site, noise_keys

SITES: tuple[Site, ...] = get_args(Site)
ROWS, WIDTH = 600, 96
Floats = npt.NDArray[np.float64]


def uniform(seed: int, step: int = 0, site: Site = "items", *, rows: int = ROWS, width: int = WIDTH) -> Floats:
    """Return centred numbers of variance 1."""
    words = Noise.of(seed, step).at(site, torch.arange(rows))._words(width)
    return words.double().numpy() / 2**32 * float(np.sqrt(12))


def correlation(first: Floats, second: Floats) -> float:
    """Return a correlation in units of its standard error."""
    return float((first * second).mean() * np.sqrt(first.size))


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (0, 1), (1, 0), (2**32 - 1, 2**20)])
def test_words_are_uniform(seed: int, step: int) -> None:
    """Chi-square over 128 bins: 127 expected, standard deviation 16."""
    drawn = uniform(seed, step)
    counts, _ = np.histogram(drawn, 128, (-np.sqrt(3), np.sqrt(3)))
    expected = drawn.size / 128
    assert counts.sum() == drawn.size
    assert 60 < ((counts - expected) ** 2 / expected).sum() < 215
    assert abs(drawn.mean() * np.sqrt(drawn.size)) < 4
    assert drawn.var() == pytest.approx(1, abs=0.02)


def test_rows_and_columns_are_independent() -> None:
    """Sums of squared correlations are those of chance, of the numbers and of what dropout makes of them."""
    drawn = uniform(3, 7)
    dropped = (drawn < np.sqrt(12) * -0.4) * 1.0
    for values in (drawn, (dropped - dropped.mean()) / dropped.std()):
        for table in (values, values.T):
            size, pairs = len(table), table.shape[1] * (table.shape[1] - 1)
            found = table.T @ table / size
            np.fill_diagonal(found, 0)
            assert (found**2).sum() * size / pairs == pytest.approx(1, abs=0.15)
            assert np.abs(found).max() < 0.9  # no two are alike


def test_rectangles_are_independent() -> None:
    """Rows times columns would leave a trace in products over the corners of rectangles."""
    drawn, random = uniform(5), np.random.default_rng(0)
    (i, k), (j, m) = random.integers(ROWS, size=(2, 100_000)), random.integers(WIDTH, size=(2, 100_000))
    apart = (i != k) & (j != m)
    i, j, k, m = i[apart], j[apart], k[apart], m[apart]
    assert abs((drawn[i, j] * drawn[i, m] * drawn[k, j] * drawn[k, m]).mean() * np.sqrt(len(i))) < 4


def test_seeds_steps_and_sites_have_noise_of_their_own() -> None:
    drawn = [uniform(seed, step, site) for seed in (0, 1) for step in (0, 1, 2) for site in SITES]
    assert max(abs(correlation(a, b)) for a, b in combinations(drawn, 2)) < 5
    moved = [(a[1:], a[:-1]) for a in drawn] + [(a[:, 1:], a[:, :-1]) for a in drawn]
    assert max(abs(correlation(a, b)) for a, b in moved) < 5
    keys = torch.cat([noise_keys(seed, range(500)) for seed in range(40)])
    assert len(set(keys.tolist())) == len(keys)


def test_copies_have_noise_of_their_own() -> None:
    first, second = np.asarray(Noise.of(0).at("prototypes", torch.arange(ROWS))._words(WIDTH, 2).double())
    assert abs(correlation(first / 2**32 * np.sqrt(12), second / 2**32 * np.sqrt(12))) < 4


def test_a_number_depends_on_the_name_of_its_row_alone() -> None:
    rows = torch.tensor([4, 2**40, 0, 4])
    drawn = Noise.of(1, 2).at("items", rows).keep(9, 0.5, torch.float32)
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])
    wider = Noise.of(1, 2).at("items", torch.arange(7)).keep(12, 0.5, torch.float32)
    assert torch.equal(drawn[0], wider[4, :9])
    assert torch.equal(drawn, Noise.of(1, 2).at("items", rows).keep(9, 0.5, torch.float32))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    keep = Noise.of(3).at("items", torch.arange(ROWS)).keep(WIDTH, p, torch.float64)
    assert keep.dtype == torch.float64
    assert set(keep.flatten().tolist()) <= {0.0, 1 / (1 - p)}
    error = np.sqrt(p * (1 - p) / keep.numel())
    assert float((keep == 0).double().mean()) == pytest.approx(p, abs=4 * error)
    assert float(keep.mean()) == pytest.approx(1, abs=4 * error / (1 - p))


def test_gumbel_numbers_have_their_distribution() -> None:
    drawn = Noise.of(4).at("mixtures", torch.arange(ROWS)).gumbel(WIDTH).double().flatten()
    assert bool(torch.isfinite(drawn).all())
    at = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    expected = torch.exp(-torch.exp(-at))
    found = (drawn.unsqueeze(-1) <= at).double().mean(0)
    torch.testing.assert_close(found, expected, atol=4 * 0.5 / drawn.numel() ** 0.5, rtol=0)


def test_batched_keys_give_each_its_own() -> None:
    keys, rows = torch.cat([noise_keys(seed, range(5, 6)) for seed in range(3)]), torch.arange(6)
    rates = Dropout.stacked([0.1, 0.5, 0.0], torch.device("cpu"))

    def drawn(key: torch.Tensor, threshold: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = Noise(key, Dropout(threshold, scale)).at("items", rows)
        return noise.keep(8, 0.3, torch.float32, copies=2), noise.gumbel(4)

    keep, gumbel = torch.func.vmap(drawn)(keys, torch.as_tensor(rates.threshold), rates.scale)
    for i, p in enumerate((0.1, 0.5, 0.0)):
        alone = Noise.of(i, 5).at("items", rows)
        assert torch.equal(keep[i], alone.keep(8, p, torch.float32, copies=2))
        assert torch.equal(gumbel[i], alone.gumbel(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_draws_the_same() -> None:
    rows = torch.arange(50)
    here = Noise.of(1, 3).at("items", rows).keep(33, 0.2, torch.float32)
    there = Noise.of(1, 3, device="cuda").at("items", rows.cuda()).keep(33, 0.2, torch.float32)
    assert torch.equal(here, there.cpu())
