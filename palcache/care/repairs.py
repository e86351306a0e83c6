"""Mend a cache: what is sound in a damaged shard is kept, the rest is encoded again from the texts of the tables."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache, Space
from palcache.care.compactions import refuse_writers
from palcache.care.verification import role_of, spaces_of_encoder
from palcache.configs import EmbedConfig
from palcache.embedding.summaries import EmbedSummary, OnProgress
from palcache.embedding.works import token_rows, tokenize_items
from palcache.embedding.writers import SpaceWriter, Work
from palcache.encoders import Encoder
from palcache.errors import CacheError, StorageError
from palcache.files import publish
from palcache.fingerprints import digest
from palcache.storage.claims import make_claim, survey
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.copies import copy_rows, draft_rows
from palcache.storage.datasets import ShardHeader
from palcache.storage.indexes import KeyIndex
from palcache.storage.layouts import create_shard, open_shard
from palcache.storage.locks import locked, rewriting
from palcache.storage.references import Items, known_items, wanted_keys
from palcache.storage.salvages import Salvage, is_whole, likely_headers, read_versions, salvage_shard
from palcache.storage.shards import TRUNCATED, ShardWriter

DAMAGED: Final = ".damaged"
"""Ending of a damaged shard that stands aside until its rows are encoded again."""


@final
@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did.

    Attributes:
        shards_restored: damaged shards that are again, byte for byte, what they were.
        shards_rewritten: damaged shards whose sound rows stand in a new shard.
        shards_unreadable: damaged shards of which nothing could be kept.
        rows_encoded: rows encoded again.
        rows_lost: rows that no table has a text for, so that they cannot be mended; they are left out.
        specs_restored: spaces whose spec was put back into the manifest from a shard.
    """

    shards_restored: int
    shards_rewritten: int
    shards_unreadable: int
    rows_encoded: int
    rows_lost: int
    specs_restored: int


def repair_cache(
    cache: Cache,
    load: Callable[[], Encoder],
    *,
    config: EmbedConfig | None = None,
    on_progress: OnProgress | None = None,
) -> Repair:
    """Mend damaged and missing shards, the journal, the indexes and the specs of the manifest.

    A shard whose rows are sound is laid out again without the model. Else its damaged rows, and the texts of tables that
    have no vector, are encoded again. The new shard is written beside the old one and then takes its place; a kill at any
    moment loses no sound row, and the same call goes on.

    Args:
        cache: the cache.
        load: returns the model that filled it; called only where something must be encoded.
        config: `shard_rows` and `token_budget` are used.
        on_progress: called after each batch.

    Raises:
        CacheError: another process writes the cache; nothing was changed.
        MismatchError: the model filled no space of the cache; the message names the fields that differ.
        StorageError: the disk is full or read-only.
    """
    with rewriting(cache.path):
        refuse_writers(cache)
        return _Repairer(cache, functools.cache(load), config or EmbedConfig(), on_progress).run()


@final
class _Repairer:
    """One repair under way."""

    def __init__(
        self, cache: Cache, load: Callable[[], Encoder], config: EmbedConfig, on_progress: OnProgress | None
    ) -> None:
        self.cache, self.load, self.config, self.on_progress = cache, load, config, on_progress
        self.tables = _sound_tables(cache)
        self.restored = self.rewritten = self.unreadable = self.lost = self.unkeyed = 0
        paths = [(space_id, path) for space_id in cache.space_ids for path in cache.shard_paths(space_id)]
        whole = {path: is_whole(path) for _, path in paths}
        self.damaged = [(space_id, path) for space_id, path in paths if not whole[path]]
        found = [read_versions(path) for path in whole if whole[path]]
        self.versions = [versions for versions in found if versions is not None]

    def run(self) -> Repair:
        specs = sum(self._restore_spec(space_id) for space_id in self.cache.space_ids)
        for space_id, path in self.damaged:
            self._mend(space_id, path)
        summary = EmbedSummary()
        try:
            self._encode_missing(summary)
        finally:
            self.cache.reconcile_journal()
        for space_id in self.cache.space_ids:
            self.cache.save_index(space_id)
        return Repair(
            self.restored, self.rewritten, self.unreadable, summary.encoded, self.lost + self.unkeyed, specs
        )  # fmt: skip

    def _restore_spec(self, space_id: str) -> bool:
        """Take the spec of a space from one of its shards where the manifest's is not the one it was named for."""
        if digest(self.cache.spec(space_id)) == space_id:
            return False
        for path in self.cache.shard_paths(space_id):
            with contextlib.suppress(CacheError, StorageError):
                spec = open_shard(path, shared=False)[0].spec
                if digest(spec) == space_id:
                    self.cache.set_spec(space_id, spec)
                    return True
        return False

    def _mend(self, space_id: str, path: Path) -> None:
        """Put a sound shard in the place of a damaged one, or get one ready that lacks only its damaged rows."""
        spec = self.cache.spec(space_id)
        known = known_items(self.tables, str(spec["role"]))
        salvage, headers = self._salvage(space_id, path, known)
        if salvage is None:
            self.unreadable += 1
            self.unkeyed += self.cache.journal_rows(space_id).get(path.name, 0)
            self.cache.swap_shards(space_id, {}, [path])
            return
        if self._lay_out_again(salvage, headers):
            return
        if salvage.sound.all():
            self._keep_sound(space_id, salvage)
            return
        has_text = KeyIndex.build(known.keys).find(salvage.keys) >= 0
        bad = ~salvage.sound
        if bool((salvage.keyed & has_text).all()) and self._encoder_of(space_id) is not None:
            self._begin_again(space_id, salvage, known)
            self.rewritten += 1
            return
        self.lost += int((bad & salvage.keyed & ~has_text).sum())
        self.unkeyed += int((bad & ~salvage.keyed).sum())
        self._keep_sound(space_id, salvage)

    def _salvage(self, space_id: str, path: Path, known: Items) -> tuple[Salvage | None, list[ShardHeader]]:
        own = read_versions(path)
        versions = [*self.versions, *([own] if own is not None else [])] or [{}]
        rows = [self.cache.journal_rows(space_id).get(path.name, 0)]
        with contextlib.suppress(CacheError, StorageError):
            rows.append(open_shard(path, shared=False)[0].rows)
        headers = likely_headers(space_id, self.cache.spec(space_id), rows, versions)
        return salvage_shard(path, headers, known.keys), headers

    def _lay_out_again(self, salvage: Salvage, headers: Sequence[ShardHeader]) -> bool:
        """Write the rows into a new file; return whether its digest proves that it is the one that was damaged.

        It is where only HDF5's own bytes, the header, the sums or the gaps were damaged.
        """
        path = salvage.path
        draft = path.with_name(f".{path.stem[:6]}.copy.tmp")
        part = (salvage.arrays, np.arange(salvage.header.rows))
        try:
            for header in headers:
                if header.rows == salvage.header.rows and draft_rows(draft, header, [part]) == path.stem[7:]:
                    publish(draft, path)
                    self.restored += 1
                    return True
        finally:
            draft.unlink(missing_ok=True)
        return False

    def _keep_sound(self, space_id: str, salvage: Salvage) -> None:
        """Write the sound rows into a new shard that takes the place of the damaged one."""
        rows = np.flatnonzero(salvage.sound)
        folder, sequence = salvage.path.parent, int(salvage.path.name[:6])
        added = dict([copy_rows(folder, sequence, salvage.header, [(salvage.trusted, rows)])]) if len(rows) else {}
        self.cache.swap_shards(space_id, added, [salvage.path])
        if added:
            self.rewritten += 1
        else:
            self.unreadable += 1

    def _begin_again(self, space_id: str, salvage: Salvage, known: Items) -> None:
        """Leave the shard as a killed writer would have: sound rows done, the damaged ones to do; the damaged file aside."""
        encoder, spec = self.load(), self.cache.spec(space_id)
        rows = KeyIndex.build(known.keys).find(salvage.keys)
        window = tokenize_items(encoder, role_of(spec), known.texts, known.prompts, rows)
        folder, sequence = salvage.path.parent, int(salvage.path.name[:6])
        with locked(folder.parent / ".lock"):
            claim = make_claim(folder, sequence, salvage.keys)
            try:
                flags = np.where(window.truncated, TRUNCATED, 0).astype(np.uint8)
                create_shard(
                    claim.partial,
                    salvage.header,
                    salvage.keys,
                    window.n_tokens,
                    flags,
                    prompt_tokens=window.prompt_tokens,
                    tokens=token_rows(window, spec.get("tokens")),
                )
                rows = np.flatnonzero(salvage.sound & (window.n_tokens == salvage.arrays["n_tokens"]))
                ShardWriter(claim.partial).copy(rows, salvage.trusted, rows)
                salvage.path.rename(salvage.path.with_suffix(DAMAGED))
            finally:
                claim.release()

    def _encode_missing(self, summary: EmbedSummary) -> None:
        """Encode what tables lack and what begun shards lack, space by space."""
        for space_id in self.cache.space_ids:
            folder = self.cache.path / "spaces" / space_id / "shards"
            space = self.cache.space(space_id)
            work = self._work(space, folder)
            if work is not None:
                encoder = self._encoder_of(space_id)
                if encoder is None:
                    continue  # another model's; verify goes on naming it
                before = summary.encoded
                SpaceWriter(work, encoder, self.cache, self.config, summary, self.on_progress).run()
                self.unkeyed = max(0, self.unkeyed - (summary.encoded - before))
            for path in folder.glob(f"*{DAMAGED}"):
                self.restored += (path.with_suffix(".h5")).exists()
                self.rewritten -= (path.with_suffix(".h5")).exists()
                path.unlink()

    def _work(self, space: Space, folder: Path) -> Work | None:
        """Return the texts that the space should have and lacks, with all those of the shards that were begun."""
        known = known_items(self.tables, space.role)
        keys = known.keys
        wanted = KeyIndex.build(wanted_keys(self.tables, space.space_id)).find(keys) >= 0
        begun = np.zeros(len(keys), bool)
        index = KeyIndex.build(keys)
        with locked(space.folder / ".lock"):
            for claim in survey(folder).stale:
                at = index.find(claim.keys)
                if bool((at >= 0).all()):
                    begun[at] = True
                claim.release()
        if not begun.any() and not bool((wanted & (space.find(keys) < 0)).any()):
            return None
        rows: npt.NDArray[np.int64] = np.flatnonzero(wanted | begun)
        items = known.take(rows)
        return Work(role_of(space.spec), space, items.texts, items.keys, items.prompts)

    def _encoder_of(self, space_id: str) -> Encoder | None:
        """Return the model if it fills a space."""
        encoder = self.load()
        return encoder if space_id in spaces_of_encoder(self.cache, encoder) else None


def _sound_tables(cache: Cache) -> list[StoredComparisons]:
    tables = []
    for name in cache.comparison_names:
        with contextlib.suppress(CacheError):  # verify names it
            tables.append(cache.comparisons(name))
    return tables
