"""Stage 1 in one call: from files of comparisons to a cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palcache.cache import MANIFEST, Cache
from palcache.comparisons import Comparisons, Ties
from palcache.configs import EmbedConfig, SplitConfig
from palcache.embedding.crews import embed_with_workers
from palcache.embedding.encoding import EmbedSummary, OnProgress, embed_comparisons, plan_embedding
from palcache.embedding.ranks import find_rank
from palcache.embedding.workers import MakeEncoder
from palcache.encoders import Encoder
from palcache.errors import InputError
from palcache.splits import split_comparisons
from palcache.tables import read_comparisons


def embed_tables(  # noqa: PLR0913 - keyword-only options
    tables: Sequence[Path] | Comparisons,
    cache: Path,
    *,
    name: str | None = None,
    config: EmbedConfig | None = None,
    split: SplitConfig | None = None,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "refuse",
    encoder: Encoder | None = None,
    plan: bool = False,
    devices: Sequence[str] = (),
    make_encoder: MakeEncoder | None = None,
    on_progress: OnProgress | None = None,
) -> EmbedSummary:
    """Read tables as one, split it, and encode every distinct text that the cache lacks.

    Args:
        tables: `.jsonl`, `.csv` or `.parquet` files, or comparisons at hand.
        cache: the folder, made where it is missing.
        name: of the table in the cache; by default the first file's name without its ending.
        config: the model and how it computes.
        split: how to divide the comparisons.
        columns: palcache's name of a column -> the files' name of it.
        ties: what to do with y = 0.
        encoder: a loaded encoder; None loads `config.model`.
        plan: encode and write nothing, and return what would be done.
        devices: a worker process for each, as `parse_devices` returns them; none encodes in this process. Under torchrun
            or SLURM every process makes the same call without them, and takes the device of its rank.
        make_encoder: loads the model of a configuration, in workers too; None loads `config.model`.
        on_progress: called after each batch.

    Raises:
        InputError: a table, option or path is not what was expected.
        ModelError: the model cannot be found, reached or loaded.
        NumericsError: a vector is not finite or does not fit the stored type.
        StorageError: the disk is full or read-only.
    """
    config, split = config or EmbedConfig(), split or SplitConfig()
    load, summary = make_encoder or load_default, EmbedSummary()
    with summary.timed("read"):
        name, comparisons = _read(tables, name, columns, ties, split)
    rank = find_rank(os.environ)
    if rank is not None and config.device == "auto" and not devices:
        config = replace(config, device=rank.device)
    about: dict[str, Any] = {"split": split.to_dict(), "ties": ties}
    if devices and not plan:
        if encoder is not None:
            raise InputError("Got an encoder and devices; workers load their own, so give make_encoder.")
        return embed_with_workers(
            comparisons, Cache.create(cache), devices=devices, make_encoder=load, name=name,
            config=config, about=about, on_progress=on_progress, summary=summary,
        )  # fmt: skip
    if encoder is None:
        with summary.timed("model"):
            encoder = load(config)
    if plan:
        existing = Cache(cache) if (cache / MANIFEST).is_file() else None
        return replace(plan_embedding(comparisons, encoder, existing, config=config), seconds=summary.seconds)
    return embed_comparisons(
        comparisons, encoder, Cache.create(cache), name=name, config=config, about=about,
        on_progress=on_progress, summary=summary, parts=rank.world if rank is not None else 1,
    )  # fmt: skip


def _read(
    tables: Sequence[Path] | Comparisons,
    name: str | None,
    columns: Mapping[str, str] | None,
    ties: Ties,
    split: SplitConfig,
) -> tuple[str, Comparisons]:
    """Return the name and the comparisons of the table, split."""
    if isinstance(tables, Comparisons):
        return name or "comparisons", split_comparisons(tables, split)
    comparisons = read_comparisons(tables, columns=columns, ties=ties, seed=split.seed)
    return name or tables[0].stem, split_comparisons(comparisons, split)


def load_default(config: EmbedConfig) -> Encoder:
    """Load the model of a configuration; late, because it imports transformers."""
    from palcache.encoders.choices import load_encoder

    return load_encoder(config)
