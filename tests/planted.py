"""Planted PAL-B worlds as heads and data: the truth is known, and the head is the truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from palcache.checkpoints import TrainedHead
from palcache.comparisons import Column, Comparisons
from palcache.heads import PalB
from palcache.synthetic import PlantedComparisons, Population, draw_population, population_comparisons
from palcache.users.padded_users import contrasts
from palcache.users.posteriors import Gaussian
from palcache.users.reductions import ReducedComparisons

D, P = 13, 11
TEMPERATURE = 0.05


def standard_prior(k: int, variance: float = 1.0) -> Gaussian:
    """Return the prior from which `planted` draws its users."""
    return Gaussian(torch.zeros(k - 1, dtype=torch.float64), variance * torch.eye(k - 1, dtype=torch.float64))


def planted(
    *, users: int, k: int, per_user: int, seed: int = 0, variance: float = 1.0
) -> tuple[Population, PlantedComparisons]:
    """Return users whose coordinates are normal, and their answers."""
    population = draw_population(seed=seed, users=users, k=k, d=D, p=P)
    z = math.sqrt(variance) * np.random.Generator(np.random.PCG64(seed + 1)).standard_normal((users, k - 1))
    weights = np.exp(z @ contrasts(k).numpy().T)
    population = replace(population, mixtures=weights / weights.sum(1, keepdims=True))
    answers = population_comparisons(
        population, seed=seed, prompts=40, responses=60, per_user=per_user, temperature=TEMPERATURE
    )
    return population, answers


def reduced_of(population: Population, answers: PlantedComparisons) -> ReducedComparisons:
    """Return the answers in terms of size k, in float64 and independently of `reduce_comparisons`."""
    items = answers.response_vectors.astype(np.float64) @ population.item_map.T
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    goals = np.einsum("kpd,qd->qkp", population.prompt_maps, answers.prompt_vectors.astype(np.float64))
    difference = items[answers.response_2] - items[answers.response_1]
    b = np.einsum("nkp,np->nk", goals[answers.prompt], difference) / TEMPERATURE
    grams = goals @ goals.transpose(0, 2, 1)
    number = [torch.from_numpy(a.astype(np.int64)) for a in (answers.prompt, answers.user)]
    names = tuple(f"user.{i}" for i in range(len(population.mixtures)))
    y = torch.from_numpy(answers.y.astype(np.float64))
    products = torch.from_numpy(b).unsqueeze(1)
    zeros, k = torch.zeros_like(products[..., 0]), grams.shape[1]
    return ReducedComparisons(
        "cosine", products, zeros, torch.from_numpy(grams), number[0], y, number[1], names, k, temperature=1.0
    )


def head_of(population: Population) -> TrainedHead:
    """Return the planted truth as a head without hidden layers."""
    k = len(population.prompt_maps)
    shape = PalB(D, P, k, len(population.mixtures), "mlp0-linear-dropout0-nobias", 1.0)
    parameters = {
        "f.0.weight": torch.from_numpy(population.item_map).float(),
        "g.0.weight": torch.from_numpy(population.prompt_maps).float(),
        "user.logits": torch.from_numpy(np.log(population.mixtures)).float(),
        "logit_scale": torch.tensor(math.log(1 / TEMPERATURE)),
    }
    return TrainedHead(shape, parameters, tuple(f"user.{i}" for i in range(len(population.mixtures))), {})


def table_of(answers: PlantedComparisons, *, split: list[str] | None = None) -> Comparisons:
    """Return the answers as a table whose texts are the vectors' numbers."""
    return Comparisons(
        users=Column.of(f"user.{i}" for i in answers.user),
        prompts=Column.of(f"prompt {i}" for i in answers.prompt),
        responses=Column.of(f"response {i}" for i in range(len(answers.response_vectors))).values,
        response_1=answers.response_1,
        response_2=answers.response_2,
        y=answers.y,
        split=Column.of(split) if split is not None else None,
    )


def coordinates_of(mixtures: npt.NDArray[np.float64]) -> torch.Tensor:
    """Return z of mixtures, (u, k - 1)."""
    return torch.from_numpy(np.log(mixtures)) @ contrasts(mixtures.shape[1])
