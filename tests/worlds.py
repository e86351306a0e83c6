"""Small worlds for the tests of stage 2: caches of known vectors, and planted populations whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, FitConfig, HeadConfig, StoredDtype
from palcache.embedding.encoding import embed_comparisons
from palcache.encoders import Encoder, Role, TokenizedTexts
from palcache.heads import PalB
from palcache.synthetic import PlantedComparisons, draw_population, population_comparisons
from palcache.tensors import PreferenceData, load_preferences

Vectors = npt.NDArray[np.float32]
Row = dict[str, str | int]
PLANTED_HEAD = HeadConfig(k=3, p=6, projector="mlp0-linear-dropout0")
PLANTED_FIT = FitConfig(batch_size=64, epochs=24, lr=0.01)


@final
@dataclass(frozen=True)
class KnownVectors:
    """An encoder that looks its vectors up."""

    vectors: Mapping[tuple[Role, str], Vectors]
    width: int
    model: str = "known"
    token_budget: int = 4_096
    workers: int = 1
    equal_lengths: bool = False

    @property
    def about(self) -> Mapping[str, Any]:
        """Where it came from."""
        return {"model": self.model}

    @property
    def versions(self) -> Mapping[str, str]:
        """Libraries and device."""
        return {}

    def spec(self, role: Role) -> dict[str, Any]:
        """Return what changes the meaning of a vector."""
        return {"encoder": self.model, "prefix": role, "compute_dtype": "float32"}

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:  # noqa: ARG002 - the protocol's
        """Count one token a text."""
        offsets = np.arange(len(texts) + 1)
        return TokenizedTexts(texts, np.ones(len(texts), np.uint32), np.zeros(len(texts), bool), offsets, {})

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return the known vectors."""
        return torch.from_numpy(np.stack([self.vectors[role, window.texts[row]] for row in rows]))


def known_vectors(prompts: Vectors, responses: Vectors, model: str = "known") -> KnownVectors:
    """Return the encoder of the texts `prompt 0`, ... and `response 0`, ..."""
    roles: tuple[tuple[Role, Vectors], ...] = (("prompt", prompts), ("response", responses))
    vectors = {(role, f"{role} {row}"): rows[row] for role, rows in roles for row in range(len(rows))}
    return KnownVectors(vectors, prompts.shape[1], model)


def make_cache(
    path: Path, rows: Sequence[Row], encoder: Encoder, *, name: str = "table", dtype: StoredDtype = "float32",
    shard_rows: int = 32_768,
) -> Cache:  # fmt: skip
    """Embed rows with an encoder and return the cache."""
    cache = Cache.create(path)
    config = EmbedConfig(dtype=dtype, shard_rows=shard_rows)
    embed_comparisons(Comparisons.from_rows(rows), encoder, cache, name=name, config=config)
    return cache


def rows_of(planted: PlantedComparisons, *, seed: int, shares: tuple[float, float] = (0.15, 0.15)) -> list[Row]:
    """Return planted answers as rows; a seeded draw splits them into train, val and test."""
    draw = np.random.default_rng(seed).random(len(planted))
    splits = np.where(draw < shares[0], "val", np.where(draw < sum(shares), "test", "train"))
    return [
        {
            "user_id": f"user {planted.user[i]}",
            "prompt": f"prompt {planted.prompt[i]}",
            "response_1": f"response {planted.response_1[i]}",
            "response_2": f"response {planted.response_2[i]}",
            "y": int(planted.y[i]),
            "split": str(splits[i]),
        }
        for i in range(len(planted))
    ]


def planted_rows(
    *, users: int = 7, k: int = 3, d: int = 10, p: int = 6, per_user: int = 60, seed: int = 5
) -> tuple[list[Row], KnownVectors]:
    """Return the rows of a planted population, 12 prompts and 31 responses, and the encoder of their texts."""
    population = draw_population(seed=seed, users=users, k=k, d=d, p=p, concentration=0.1)
    planted = population_comparisons(
        population, seed=seed, prompts=12, responses=31, per_user=per_user, temperature=0.05
    )
    return rows_of(planted, seed=seed), known_vectors(planted.prompt_vectors, planted.response_vectors)


def splits_of(cache: Cache, name: str | None = None) -> dict[str, PreferenceData]:
    """Return a table's splits on the CPU."""
    stored = cache.comparisons(name)
    data = load_preferences(cache, stored, device="cpu")
    column = stored.comparisons.split
    assert column is not None
    return {
        split: data.take(np.flatnonzero(column.codes == code)) for code, split in enumerate(column.values.to_pylist())
    }


def random_head(
    users: Sequence[str], *, d: int, k: int = 3, p: int = 4, seed: int = 0, about: Mapping[str, Any] | None = None
) -> TrainedHead:
    """Return a head of random parameters in which users and prototypes differ."""
    shape = PalB(d, p, k, len(users), "mlp1-gelu-dropout2", 0.7)
    generator = torch.Generator().manual_seed(seed)
    parameters = shape.initial(generator)
    parameters = {
        name: value + 0.5 * torch.randn(value.shape, generator=generator) for name, value in parameters.items()
    }
    return TrainedHead(shape, parameters, tuple(users), about or {})


def files_of(folder: Path, *, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the bytes of a folder's files by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in without}


class Interruption(KeyboardInterrupt):
    """Ctrl-C, pressed by a test."""


@final
class Interrupter:
    """Counts calls and raises at one of them.

    Args:
        number: at which.
    """

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, _event: object) -> None:
        """Take any event."""
        self.calls += 1
        if self.calls == self.number:
            raise Interruption
