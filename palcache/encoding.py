"""Stage 1: comparisons x encoder -> cache. Every distinct text is encoded once; a run that stops is resumed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from palcache.cache import Cache
from palcache.comparison_files import StoredComparisons
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.encoders import Encoder, Role
from palcache.errors import PalcacheWarning
from palcache.fingerprints import Keys, digest, text_keys
from palcache.locks import writing
from palcache.spaces import differing_fields
from palcache.summaries import EmbedProgress, EmbedSummary, OnProgress
from palcache.writers import SpaceWriter, Work

SHARDS_EACH: Final = 4
MIN_SHARD_ROWS: Final = 256
"""Where several processes share the work: shards for each of them, and rows below which a shard is not worth its file."""
CHOSEN_FIELDS: Final = frozenset({"dtype", "compute_dtype", "max_tokens", "truncate_dim"})
"""Fields of a spec that options choose."""
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
    parts: int = 1,
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
        parts: how many processes make this call side by side, each of which should find shards to write.

    Raises:
        InputError: the name is no file name.
        ModelError: the encoder fails on text after text.
        NumericsError: a vector is not finite or does not fit the stored type.
        StorageError: the disk is full or read-only.
    """
    cache.check_name(name)
    config, summary = config or EmbedConfig(), summary or EmbedSummary()
    with summary.timed("total"), writing(cache.path):
        with summary.timed("keys"):
            works = find_works(keyed_sides(comparisons), encoder, cache, config)
            summary.references += 3 * len(comparisons)
            count_works(summary, works)
        fill_spaces(works, encoder, cache, config, summary, on_progress=on_progress, parts=parts)
        store_table(comparisons, cache, summary, name=name, about=about)
    return summary


def fill_spaces(
    works: Sequence[Work],
    encoder: Encoder,
    cache: Cache,
    config: EmbedConfig,
    summary: EmbedSummary,
    *,
    on_progress: OnProgress | None = None,
    parts: int = 1,
) -> None:
    """Encode what spaces lack until every wanted text is in a sealed shard, by this process or another.

    Args:
        works: the texts by role.
        encoder: a frozen model.
        cache: where to.
        config: `shard_rows` and `token_budget` are used.
        summary: is added to.
        on_progress: called after each batch.
        parts: how many processes share the work; shards are made small enough for all to have some.
    """
    waiting = []
    for work in works:
        writer = SpaceWriter(work, encoder, cache, config, summary, on_progress)
        if parts > 1:
            share = -(-writer.missing // (SHARDS_EACH * parts))
            writer.config = replace(config, shard_rows=min(config.shard_rows, max(MIN_SHARD_ROWS, share)))
        if not writer.run(wait=parts == 1):
            waiting.append(writer)
    for writer in waiting:  # what others began first comes last
        writer.run()


def store_table(
    comparisons: Comparisons, cache: Cache, summary: EmbedSummary, *, name: str, about: dict[str, Any] | None
) -> None:
    """Bring the indexes up to date and store a table whose texts are all encoded."""
    with summary.timed("write"):
        for space_id in summary.spaces.values():
            cache.save_index(space_id)
        spaces = ((summary.spaces["prompt"], summary.spaces["response"]),)
        cache.put_comparisons(StoredComparisons(name, comparisons, comparisons.fingerprint(), spaces, about or {}))


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


def keyed_sides(comparisons: Comparisons) -> list[tuple[Role, pa.Array, Keys]]:
    """Return the distinct texts of a table by role, with their keys."""
    return [(role, texts, text_keys(texts)) for role, texts in _sides(comparisons)]


def find_works(
    sides: Sequence[tuple[Role, pa.Array, Keys]], encoder: Encoder, cache: Cache, config: EmbedConfig
) -> list[Work]:
    """Return the texts of each role with the space that they belong in, made where it is missing.

    Warns:
        PalcacheWarning: the cache has vectors of a model of the same name that is not the same model.
    """
    works = []
    for role, texts, keys in sides:
        spec = full_spec(encoder, role, config)
        _warn_of_change(cache, spec, encoder.about.get("model"))
        space_id = cache.add_space(spec, encoder.about)
        works.append(Work(role, cache.space(space_id), texts, keys))
    return works


def _warn_of_change(cache: Cache, spec: Mapping[str, Any], model: str | None) -> None:
    """Say so where the model of a name has changed since the cache was filled; what an option chose is no change."""
    if model is None or digest(spec) in cache.space_ids:
        return
    others = [space_id for space_id in cache.space_ids if cache.about(space_id).get("model") == model]
    fields: list[list[str]] = [
        [name for name in differing_fields(cache.spec(other), spec) if name not in CHOSEN_FIELDS]
        for other in others
        if cache.spec(other).get("role") == spec["role"]
    ]
    if fields and all(fields):
        nearest = min((len(names), names) for names in fields)[1]
        warnings.warn(
            f"The model {model} is not the one that filled this cache: its {', '.join(nearest)} changed since, "
            f"so its {spec['role']} vectors go into a space of their own and every text is encoded again.",
            PalcacheWarning,
            stacklevel=2,
        )


def count_works(summary: EmbedSummary, works: Sequence[Work]) -> None:
    """Enter distinct texts, hits and space ids into a summary."""
    for work in works:
        summary.distinct[work.role] = len(work.texts)
        summary.spaces[work.role] = work.space.space_id
        summary.hits += int((work.space.find(work.keys) >= 0).sum())
