"""The benchmark of memory, scaled down: encoding more texts takes no more memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.states import GROWTH, growth


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory of the process from /proc")
def test_memory_stays_flat_over_many_texts() -> None:
    early, late, _ = growth(60_000, shard_rows=2_048)
    assert late - early <= GROWTH // 2
