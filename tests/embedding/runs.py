"""Runs of stage 1 with the stub encoder, and what must be true of the caches they leave."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from palcache.cache import Cache, Space
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import EmbedProgress, EmbedSummary, embed_comparisons
from palcache.encoders import Role
from palcache.fingerprints import text_keys
from tests.stubs import StubEncoder, as_encoder, contents, small_table, texts_of

SHARD_ROWS = 4
CONFIG = EmbedConfig(shard_rows=SHARD_ROWS)
ROLES: tuple[Role, ...] = ("prompt", "response")


def run(
    path: Path,
    table: Comparisons | None = None,
    encoder: StubEncoder | None = None,
    config: EmbedConfig = CONFIG,
    name: str = "table",
    on_progress: Callable[[EmbedProgress], None] | None = None,
) -> EmbedSummary:
    """Embed a table."""
    table, encoder = table or small_table(), encoder or StubEncoder()
    cache = Cache.create(path)
    return embed_comparisons(table, as_encoder(encoder), cache, name=name, config=config, on_progress=on_progress)


def space_of(path: Path, role: Role, name: str = "table") -> Space:
    """Return a space of a table's only encoder."""
    cache = Cache(path)
    return cache.space(cache.comparisons(name).spaces[0][ROLES.index(role)])


def assert_holds(path: Path, table: Comparisons, encoder: StubEncoder, name: str = "table") -> None:
    """Assert that a cache is sound and holds the right vector of every text of a table."""
    assert verify_cache(Cache(path)).problems == ()
    for role in ROLES:
        space, texts = space_of(path, role, name), texts_of(table, role)
        rows = space.find(text_keys(table.prompts.values if role == "prompt" else table.responses))
        expected = np.stack([encoder.vector(text, role) for text in texts])
        np.testing.assert_allclose(space.rows(rows).float().numpy(), expected, atol=2e-3)


def leftovers(path: Path) -> list[str]:
    """Return the files that a finished run must not leave."""
    return [name for name in contents(path) if name.endswith((".claim", ".partial", ".tmp"))]


def wait_for(*logs: Path, lines: int) -> int:
    """Wait until one of several writers has encoded that many texts; return which."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for number, log in enumerate(logs):
            if not lines or (log.exists() and log.read_bytes().count(b"\n") >= lines):
                return number
        time.sleep(0.002)
    raise TimeoutError(f"nobody encoded {lines} texts")


def begin(path: Path, table: Comparisons, encoder: StubEncoder) -> None:
    """Embed and stop in the middle of the second shard of responses."""

    def interrupt(event: EmbedProgress) -> None:
        if event.role == "response" and event.texts > SHARD_ROWS:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run(path, table, encoder, on_progress=interrupt)
    assert [name[-14:] for name in leftovers(path) if name.endswith(".partial")] == ["000002.partial"]
