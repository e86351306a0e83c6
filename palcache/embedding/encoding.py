"""Stage 1: comparisons x encoder -> cache. Every distinct text is encoded once; a run that stops is resumed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.embedding.specs import full_spec, kept_tokens, warn_of_other_spec
from palcache.embedding.summaries import EmbedProgress, EmbedSummary, OnProgress
from palcache.embedding.works import Work, as_state_encoder, tokenize_items
from palcache.embedding.writers import SpaceWriter
from palcache.encoders import Encoder, Role
from palcache.errors import PalcacheWarning
from palcache.fingerprints import Keys, digest, joint_keys, text_keys
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.layouts import FILE_DTYPES
from palcache.storage.locks import writing
from palcache.storage.spaces import Space

SHARDS_EACH: Final = 4
MIN_SHARD_ROWS: Final = 256
"""Where several processes share the work: shards for each of them, and rows below which a shard is not worth its file."""
SHARD_BYTES: Final = 160 << 10
"""What a shard takes beside its rows: some 40 objects of HDF5, aligned to 4,096 bytes. Only plans go by it."""
__all__ = ["EmbedProgress", "EmbedSummary", "OnProgress", "embed_comparisons", "full_spec", "plan_embedding"]

_Rows = npt.NDArray[np.int64]


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
        config: `dtype`, `items`, `tokens`, `shard_rows` and `token_budget` are used.
        about: how the table was read and split, stored beside it.
        on_progress: called after each batch.
        summary: to be added to, for callers that time the reading.
        parts: how many processes make this call side by side, each of which should find shards to write.

    Raises:
        InputError: the name is no file name, or the encoder gives no token states or joint items that are asked for.
        ModelError: the encoder fails on text after text.
        NumericsError: a vector is not finite or does not fit the stored type.
        StorageError: the disk is full or read-only.
    """
    cache.check_name(name)
    config, summary = config or EmbedConfig(), summary or EmbedSummary()
    with summary.timed("total"), writing(cache.path):
        with summary.timed("keys"):
            sides = find_sides(comparisons, config)
            works = find_works(sides, encoder, cache, config, name=name)
            summary.references += count_references(comparisons, config)
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
    """Bring the indexes up to date and store a table whose texts are all encoded.

    Warns:
        PalcacheWarning: a table of that name with other comparisons was replaced.
    """
    with summary.timed("write"):
        for space_id in summary.spaces.values():
            cache.save_index(space_id)
        joint = (summary.spaces["joint"],) if "joint" in summary.spaces else ()
        pairs = () if joint else ((summary.spaces["prompt"], summary.spaces["response"]),)
        fingerprint = comparisons.fingerprint()
        replaced = cache.put_comparisons(StoredComparisons(name, comparisons, fingerprint, pairs, about or {}, joint))
    if replaced:
        warnings.warn(
            f"The table {name} in {cache.path} had other comparisons or another split and was replaced: runs and sweeps on "
            "it no longer fit it; give --name to keep both.",
            PalcacheWarning,
            stacklevel=2,
        )


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
    config = config or EmbedConfig()
    summary = EmbedSummary(references=count_references(comparisons, config))
    _require_states(encoder, config)
    for side in find_sides(comparisons, config):
        spec = full_spec(encoder, side.role, config)
        space_id = digest(spec)
        known = np.zeros(len(side.keys), bool)
        if cache is not None and space_id in cache.space_ids:
            known = cache.space(space_id).find(side.keys) >= 0
        new = np.flatnonzero(~known)
        summary.distinct[side.role], summary.spaces[side.role] = len(known), space_id
        summary.hits += int(known.sum())
        summary.encoded += len(new)
        summary.new_bytes += len(new) * _row_bytes(encoder.width, config, prompt_state="prompt_state" in spec)
        summary.new_bytes += -(-len(new) // config.shard_rows) * SHARD_BYTES
        if len(new):
            picked = new[np.linspace(0, len(new) - 1, min(sample, len(new))).astype(int)]
            window = tokenize_items(encoder, side.role, side.texts, side.prompts, picked)
            summary.tokens += round(float(window.n_tokens.mean()) * len(new))
            summary.truncated += round(float(window.truncated.mean()) * len(new))
            if (kept := kept_tokens(side.role, config)) is not None:
                per_row = float((window.n_tokens - window.first_kept(kept)).mean())
                summary.token_bytes += round(len(new) * (per_row * (_value_bytes(encoder.width, config) + 4) + 8))
    summary.new_bytes += summary.token_bytes
    return summary


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The distinct items of one role in a table: texts, or pairs of them; what `Work` needs but the space."""

    role: Role
    texts: pa.Array
    keys: Keys
    prompts: pa.Array | None = None

    def work(self, space: Space) -> Work:
        """Return the items as work for a space."""
        return Work(self.role, space, self.texts, self.keys, self.prompts)


def find_sides(comparisons: Comparisons, config: EmbedConfig) -> list[Side]:
    """Return the distinct items of a table by role, with their keys."""
    prompts, responses = comparisons.prompts.values, comparisons.responses
    if config.items == "joint":
        pairs, _ = comparisons.joint_items()
        texts = _refer(responses, pairs[:, 1])
        return [Side("joint", texts, joint_keys(prompts, responses, pairs), _refer(prompts, pairs[:, 0]))]
    return [
        Side("prompt", prompts, text_keys(prompts)),
        Side("response", responses, text_keys(responses)),
    ]


def _require_states(encoder: Encoder, config: EmbedConfig) -> None:
    if config.tokens != "none" or config.items == "joint":
        as_state_encoder(encoder, "joint")


def _refer(values: pa.Array, rows: _Rows) -> pa.Array:
    """Return texts by reference, so that a prompt of many pairs stands in memory once."""
    return pa.DictionaryArray.from_arrays(pa.array(rows.astype(np.int32)), values)


def _value_bytes(width: int, config: EmbedConfig) -> int:
    """Return the bytes of one stored vector, its scale included."""
    return width * np.dtype(FILE_DTYPES[config.dtype]).itemsize + 4 * (config.dtype == "int8")


def _row_bytes(width: int, config: EmbedConfig, *, prompt_state: bool) -> int:
    return _value_bytes(width, config) * (1 + prompt_state) + 26 + 4 * prompt_state  # key, norm, tokens, flags, done


def count_references(comparisons: Comparisons, config: EmbedConfig) -> int:
    """Return how many items a table names: a prompt and two responses a row, or two joint items."""
    return len(comparisons) * (2 if config.items == "joint" else 3)


def find_works(sides: Sequence[Side], encoder: Encoder, cache: Cache, config: EmbedConfig, *, name: str) -> list[Work]:
    """Return the items of each role with the space that they belong in, made where it is missing.

    Args:
        sides: the items.
        encoder: a frozen model.
        cache: where to.
        config: `dtype`, `items` and `tokens` are used.
        name: of the table in the cache.

    Raises:
        InputError: the encoder gives no token states or joint items that are asked for.

    Warns:
        PalcacheWarning: another encoder filled the cache or the table's spaces.
    """
    _require_states(encoder, config)
    works = []
    for side in sides:
        spec = full_spec(encoder, side.role, config)
        warn_of_other_spec(cache, name, spec, encoder.about)
        works.append(side.work(cache.space(cache.add_space(spec, encoder.about))))
    return works


def count_works(summary: EmbedSummary, works: Sequence[Work]) -> None:
    """Enter distinct items, hits and space ids into a summary."""
    for work in works:
        summary.distinct[work.role] = len(work.texts)
        summary.spaces[work.role] = work.space.space_id
        summary.hits += int((work.space.find(work.keys) >= 0).sum())
