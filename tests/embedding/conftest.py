"""A folder in memory, and the files of a run that nothing stopped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.embedding.runs import run
from tests.stubs import contents


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder in memory where there is one, because these tests write and sync thousands of small files."""
    memory = Path("/dev/shm")  # noqa: S108 - made unique below
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture
def reference(folder: Path) -> dict[str, bytes]:
    """Return the files of a run that nothing stopped."""
    run(folder / "reference")
    return contents(folder / "reference")
