"""Rows of sealed shards copied into a new one, every dataset of them, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from palcache.files import publish
from palcache.storage.datasets import Array, ShardHeader, TokenRows
from palcache.storage.layouts import create_shard
from palcache.storage.shards import ShardWriter, token_places

Part = tuple[Mapping[str, Array], Array]
"""Every dataset of a shard with something of its rows, by name, and the numbers of the rows to take, (m,)."""


def copy_rows(folder: Path, sequence: int, header: ShardHeader, parts: Sequence[Part]) -> tuple[Path, int]:
    """Write rows of other shards as one sealed shard and return its path and rows; it is there whole, or not at all.

    Args:
        folder: the space's folder of shards.
        sequence: the new shard's number.
        header: what the new shard says of itself; its `rows` is filled in.
        parts: where the rows come from.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    draft = folder / f".{sequence:06d}.copy.tmp"
    try:
        digest = draft_rows(draft, header, parts)
        path = folder / f"{sequence:06d}-{digest}.h5"
        publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path, sum(len(rows) for _, rows in parts)


def draft_rows(draft: Path, header: ShardHeader, parts: Sequence[Part]) -> str:
    """Write rows of other shards as one sealed shard at `draft`, and return its digest.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    sources = [(arrays, np.asarray(rows, np.int64)) for arrays, rows in parts]
    whole = {
        name: np.concatenate([arrays[name][rows] for arrays, rows in sources])
        for name in ("key", "n_tokens", "flags", "n_prompt")
        if name in sources[0][0]
    }
    create_shard(
        draft,
        replace(header, rows=len(whole["key"])),
        whole["key"],
        whole["n_tokens"],
        whole["flags"],
        prompt_tokens=whole.get("n_prompt"),
        tokens=_tokens(sources) if "tok/offsets" in sources[0][0] else None,
    )
    writer = ShardWriter(draft)
    at = 0
    for arrays, rows in sources:
        writer.copy(np.arange(at, at + len(rows)), arrays, rows)
        at += len(rows)
    return writer.seal()


def _tokens(sources: Sequence[Part]) -> TokenRows:
    """Return which tokens of rows of other shards have their states kept."""
    offsets = [(arrays["tok/offsets"], rows) for arrays, rows in sources]
    lengths = np.concatenate([starts[rows + 1] - starts[rows] for starts, rows in offsets])
    ids = [arrays["tok/ids"][token_places(arrays["tok/offsets"], rows)] for arrays, rows in sources]
    return TokenRows(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(ids))
