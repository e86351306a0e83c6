"""Stage 1: comparisons x encoder -> cache. Every distinct text is encoded once; a run that stops is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from palcache.cache import Cache
from palcache.comparison_files import StoredComparisons
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.encoders import Encoder, Role
from palcache.fingerprints import digest, text_keys
from palcache.summaries import EmbedProgress, EmbedSummary, OnProgress
from palcache.writers import SpaceWriter, Work

__all__ = ["EmbedProgress", "EmbedSummary", "OnProgress", "embed_comparisons", "full_spec", "plan_embedding"]


def embed_comparisons(  # noqa: PLR0913 - keyword-only options
    comparisons: Comparisons,
    encoder: Encoder,
    cache: Cache,
    *,
    name: str,
    config: EmbedConfig | None = None,
    about: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    summary: EmbedSummary | None = None,
) -> EmbedSummary:
    """Encode every text of a table that the cache lacks, then store the table under `name`.

    A stop at any moment, `kill -9` included, loses at most the batch in flight; the same call goes on from there, and
    the finished cache is the same byte for byte. Several processes may embed into one cache at once.

    Args:
        comparisons: the table.
        encoder: a frozen model.
        cache: where to.
        name: of the table in the cache; a table of that name is replaced.
        config: `dtype`, `shard_rows` and `token_budget` are used.
        about: how the table was read and split, stored beside it.
        on_progress: called after each batch.
        summary: to be added to, for callers that time the reading.

    Raises:
        InputError: the name is no file name.
        ModelError: the encoder fails on text after text.
        NumericsError: a vector is not finite or does not fit the stored type.
        StorageError: the disk is full or read-only.
    """
    cache.check_name(name)
    config, summary = config or EmbedConfig(), summary or EmbedSummary()
    with summary.timed("total"):
        with summary.timed("keys"):
            works = _works(comparisons, encoder, cache, config)
            _count(summary, comparisons, works)
        for work in works:
            SpaceWriter(work, encoder, cache, config, summary, on_progress).run()
            summary.spaces[work.role] = work.space.space_id
        with summary.timed("write"):
            for space_id in summary.spaces.values():
                cache.save_index(space_id)
            spaces = ((summary.spaces["prompt"], summary.spaces["response"]),)
            cache.put_comparisons(StoredComparisons(name, comparisons, comparisons.fingerprint(), spaces, about or {}))
    return summary


def plan_embedding(
    comparisons: Comparisons,
    encoder: Encoder,
    cache: Cache | None,
    *,
    config: EmbedConfig | None = None,
    sample: int = 1_000,
) -> EmbedSummary:
    """Return what `embed_comparisons` would do, without encoding or writing anything.

    Args:
        comparisons: the table.
        encoder: a frozen model.
        cache: an existing cache, or None for a new one.
        config: as for `embed_comparisons`.
        sample: tokens are estimated from this many texts per role.
    """
    config, summary = config or EmbedConfig(), EmbedSummary(references=3 * len(comparisons))
    for role, texts in _sides(comparisons):
        space_id = digest(full_spec(encoder, role, config))
        known = np.zeros(len(texts), bool)
        if cache is not None and space_id in cache.space_ids:
            known = cache.space(space_id).find(text_keys(texts)) >= 0
        new = np.flatnonzero(~known)
        summary.distinct[role], summary.spaces[role] = len(texts), space_id
        summary.hits += int(known.sum())
        summary.encoded += len(new)
        summary.new_bytes += len(new) * _row_bytes(encoder.width, config)
        if len(new):
            picked = new[np.linspace(0, len(new) - 1, min(sample, len(new))).astype(int)]
            window = encoder.tokenize(texts.take(pa.array(picked)).to_pylist(), role)
            summary.tokens += round(float(window.n_tokens.mean()) * len(new))
            summary.truncated += round(float(window.truncated.mean()) * len(new))
    return summary


def full_spec(encoder: Encoder, role: Role, config: EmbedConfig) -> dict[str, Any]:
    """Return the spec of a space: the encoder's, the stored type and the width."""
    return {**encoder.spec(role), "role": role, "dtype": config.dtype, "width": encoder.width}


def _sides(comparisons: Comparisons) -> tuple[tuple[Role, pa.Array], tuple[Role, pa.Array]]:
    """Return the distinct texts by role."""
    return ("prompt", comparisons.prompts.values), ("response", comparisons.responses)


def _row_bytes(width: int, config: EmbedConfig) -> int:
    return width * (4 if config.dtype == "float32" else 2) + 26  # key, norm, tokens, flags, done


def _works(comparisons: Comparisons, encoder: Encoder, cache: Cache, config: EmbedConfig) -> list[Work]:
    works = []
    for role, texts in _sides(comparisons):
        space_id = cache.add_space(full_spec(encoder, role, config), encoder.about)
        works.append(Work(role, cache.space(space_id), texts, text_keys(texts)))
    return works


def _count(summary: EmbedSummary, comparisons: Comparisons, works: Sequence[Work]) -> None:
    summary.references += 3 * len(comparisons)
    for work in works:
        summary.distinct[work.role] = len(work.texts)
        summary.hits += int((work.space.find(work.keys) >= 0).sum())
