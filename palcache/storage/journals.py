"""`journal.jsonl`: one line per sealed shard, which the folders can always make good."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from palcache.files import write_bytes
from palcache.fingerprints import canonical_json


def read_journal(path: Path) -> dict[tuple[str, str], int]:
    """Return (space id, shard name) -> rows of every line that can be read."""
    entries: dict[tuple[str, str], int] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short by a crash
            entry = json.loads(line)
            entries.setdefault((str(entry["space"]), str(entry["shard"])), int(entry["rows"]))
    return entries


def write_journal(path: Path, rows: Mapping[tuple[str, str], int]) -> None:
    """Replace the journal where it says something else. Call under the cache's lock.

    Raises:
        StorageError: the disk is full, or `path` cannot be written.
    """
    content = b"".join(journal_line(*entry, count) for entry, count in rows.items())
    if content != (path.read_bytes() if path.is_file() else b""):
        write_bytes(path, content)


def journal_line(space_id: str, shard: str, rows: int) -> bytes:
    """Return a shard's line."""
    return canonical_json({"rows": rows, "shard": shard, "space": space_id}) + b"\n"
