"""Stage 1: comparisons x encoder -> cache. Every distinct text is encoded once; a run that stops is resumed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from palcache.batching import padded_tokens, plan_batches
from palcache.cache import Cache, Space
from palcache.claims import Claim, adoptable, locked, make_claim, next_sequence, survey
from palcache.comparison_files import StoredComparisons
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.encoders import Encoder, Role, TokenizedTexts
from palcache.errors import CacheError, ModelError, NumericsError
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json, digest, hex_key, text_keys
from palcache.indexes import KeyIndex
from palcache.shards import FAILED, TRUNCATED, Shard, ShardHeader, ShardWriter, create_shard

ROLES: Final[tuple[Role, ...]] = ("prompt", "response")
WAIT_SECONDS: Final = 0.5
MAX_FAILURES: Final = 8


@final
@dataclass(slots=True)
class EmbedSummary:
    """What an embed did, or with `plan_embedding` would do.

    Attributes:
        references: texts named by the comparisons (three a comparison).
        distinct: distinct texts by role.
        hits: of these, how many the cache already had.
        encoded: texts encoded now.
        failed: texts that could not be encoded; see `failed.jsonl` in the space's folder.
        truncated: texts longer than the model's limit.
        tokens: tokens of the encoded texts (estimated from a sample in a plan).
        padded: tokens computed, padding included.
        new_bytes: bytes of vectors written.
        seconds: wall time by stage: read, keys, tokenize, forward, write, total; tokenize runs beside forward.
        spaces: space id by role.
    """

    references: int = 0
    distinct: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    encoded: int = 0
    failed: int = 0
    truncated: int = 0
    tokens: int = 0
    padded: int = 0
    new_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    spaces: dict[str, str] = field(default_factory=dict)

    @property
    def repeats_saved(self) -> int:
        """References that needed no encoding of their own."""
        return self.references - self.encoded

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@final
@dataclass(frozen=True, slots=True)
class EmbedProgress:
    """Where an embed stands.

    Attributes:
        role: the space being filled.
        texts: texts encoded by this run.
        texts_total: texts this run has to encode.
        tokens: tokens encoded by this run.
        tokens_total: tokens it has to encode: known for tokenised windows, extrapolated for the rest.
        started: `time.perf_counter()` when this role's encoding began.
        waiting: nothing is left but what another writer is working on.
    """

    role: Role
    texts: int
    texts_total: int
    tokens: int
    tokens_total: int
    started: float
    waiting: bool = False


_Forward = Callable[[], torch.Tensor]
OnProgress = Callable[[EmbedProgress], None]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """The texts of one role that a space may lack.

    Attributes:
        role: prompt or response.
        space: where they go.
        texts: the distinct texts, (m,).
        keys: their keys, (m, 16).
    """

    role: Role
    space: Space
    texts: pa.Array
    keys: Keys


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
        NumericsError: a vector is not finite or does not fit the stored type.
        StorageError: the disk is full or read-only.
    """
    config, summary = config or EmbedConfig(), summary or EmbedSummary()
    with summary.timed("total"):
        with summary.timed("keys"):
            works = _works(comparisons, encoder, cache, config)
            _count(summary, comparisons, works)
        for work in works:
            _SpaceWriter(work, encoder, cache, config, summary, on_progress).run()
            summary.spaces[work.role] = work.space.space_id
        with summary.timed("write"):
            for space_id in summary.spaces.values():
                cache.space(space_id).save_index()
            _store(comparisons, cache, name, (works[0].space.space_id, works[1].space.space_id), about or {})
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
    sides: tuple[tuple[Role, pa.Array], ...] = (
        ("prompt", comparisons.prompts.values),
        ("response", comparisons.responses),
    )
    for role, texts in sides:
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


def _row_bytes(width: int, config: EmbedConfig) -> int:
    return width * (4 if config.dtype == "float32" else 2) + 26  # key, norm, tokens, flags, done


def _works(comparisons: Comparisons, encoder: Encoder, cache: Cache, config: EmbedConfig) -> list[_Work]:
    works = []
    sides: tuple[tuple[Role, pa.Array], ...] = (
        ("prompt", comparisons.prompts.values),
        ("response", comparisons.responses),
    )
    for role, texts in sides:
        space_id = cache.add_space(full_spec(encoder, role, config), encoder.about)
        works.append(_Work(role, cache.space(space_id), texts, text_keys(texts)))
    return works


def _count(summary: EmbedSummary, comparisons: Comparisons, works: Sequence[_Work]) -> None:
    summary.references += 3 * len(comparisons)
    for work in works:
        summary.distinct[work.role] = len(work.texts)
        summary.hits += int((work.space.find(work.keys) >= 0).sum())


def _store(comparisons: Comparisons, cache: Cache, name: str, spaces: tuple[str, str], about: dict[str, Any]) -> None:
    fingerprint, known = comparisons.fingerprint(), {spaces}
    if name in cache.comparison_names:
        before = cache.comparisons(name)
        if before.fingerprint == fingerprint:
            known |= set(before.spaces)
    cache.put_comparisons(StoredComparisons(name, comparisons, fingerprint, tuple(sorted(known)), about))


@final
class _SpaceWriter:
    """Fills one space: claims shards, tokenises ahead in a thread, encodes, seals."""

    def __init__(
        self,
        work: _Work,
        encoder: Encoder,
        cache: Cache,
        config: EmbedConfig,
        summary: EmbedSummary,
        on_progress: OnProgress | None,
    ) -> None:
        self.work, self.encoder, self.cache, self.config = work, encoder, cache, config
        self.summary, self.on_progress = summary, on_progress
        self.wanted = KeyIndex.build(work.keys)
        self.todo = np.ones(len(work.keys), bool)  # neither sealed nor claimed by a living writer
        self.budget = config.token_budget or encoder.token_budget
        self._sealed: set[str] | None = None
        self._held: list[Claim] = []
        self._texts = self._tokens = 0
        self._texts_total = int((work.space.find(work.keys) < 0).sum())
        self._known_tokens = self._known_texts = 0
        self._started = time.perf_counter()

    def run(self) -> None:
        """Encode until every wanted key is in a sealed shard."""
        with ThreadPoolExecutor(1, thread_name_prefix="palcache-tokenize") as ahead:
            try:
                upcoming: Future[tuple[Claim, TokenizedTexts] | None] = ahead.submit(self._next)
                while True:
                    current = upcoming.result()
                    if current is None:
                        if self._all_sealed():
                            return
                        self._report(waiting=True)
                        time.sleep(WAIT_SECONDS)
                        upcoming = ahead.submit(self._next)
                        continue
                    upcoming = ahead.submit(self._next)
                    self._encode_shard(*current)
            finally:
                ahead.shutdown(wait=True, cancel_futures=True)
                for claim in self._held:
                    claim.release()

    def _next(self) -> tuple[Claim, TokenizedTexts] | None:
        """Claim and tokenise the next shard; None when nothing is left to claim."""
        claim = self._claim()
        if claim is None:
            return None
        start = time.perf_counter()
        texts = self.work.texts.take(pa.array(self.wanted.find(claim.keys))).to_pylist()
        window = self.encoder.tokenize(texts, self.work.role)
        seconds = self.summary.seconds
        seconds["tokenize"] = seconds.get("tokenize", 0.0) + time.perf_counter() - start
        return claim, window

    def _claim(self) -> Claim | None:
        """Go on with a dead writer's shard, or claim new keys that no living writer has."""
        folder = self.work.space.shard_folder
        with locked(self.work.space.folder / ".lock"):
            standing = survey(folder)
            adopted: Claim | None = None
            for claim in standing.stale:
                if adopted is None and adoptable(claim, self.wanted):
                    adopted = claim
                else:
                    claim.release()
            if adopted is None:
                free = self.todo.copy()
                free[self._sealed_rows(folder)] = False
                self.todo = free.copy()
                taken = self.wanted.find(standing.live)
                free[taken[taken >= 0]] = False
                rows = np.flatnonzero(free)[: self.config.shard_rows]
                if not len(rows):
                    return None
                adopted = make_claim(folder, next_sequence(folder), self.work.keys[rows])
        self._held.append(adopted)
        return adopted

    def _sealed_rows(self, folder: Path) -> npt.NDArray[np.int64]:
        """Return the wanted rows in shards sealed since the last look; texts that failed in an earlier run are left."""
        first = self._sealed is None
        known = self._sealed or set()
        fresh = [Shard(path) for path in sorted(folder.glob("*.h5")) if path.name not in known]
        self._sealed = known | {shard.path.name for shard in fresh}
        keys = [shard.keys[(shard.flags & FAILED) == 0] if first else shard.keys for shard in fresh]
        found = self.wanted.find(np.concatenate([*keys, np.empty((0, KEY_BYTES), np.uint8)]))
        return found[found >= 0]

    def _all_sealed(self) -> bool:
        with locked(self.work.space.folder / ".lock"):
            self.todo[self._sealed_rows(self.work.space.shard_folder)] = False
        return not self.todo.any()

    def _encode_shard(self, claim: Claim, window: TokenizedTexts) -> None:
        writer = self._open_shard(claim, window)
        pending = writer.pending()
        waiting = np.zeros(len(claim.keys), bool)
        waiting[pending] = True
        self._known_texts += len(pending)
        self._known_tokens += int(window.n_tokens[pending].sum())
        planned = plan_batches(window.n_tokens, self.budget, equal_lengths=self.encoder.equal_lengths)
        batches = [rows for rows in planned if waiting[rows].any()]
        self.summary.padded += padded_tokens(window.n_tokens, batches)
        for rows, vectors in self._forward_all(window, batches):
            self._encode_batch(writer, window, rows, vectors)
        with self.summary.timed("write"):
            path = claim.commit(writer.seal())
            self._held.remove(claim)
            self.cache.record(self.work.space.space_id, path, writer.header.rows)
        self.summary.new_bytes += path.stat().st_size
        self.summary.truncated += int(window.truncated.sum())

    def _open_shard(self, claim: Claim, window: TokenizedTexts) -> ShardWriter:
        """Open the shard that a dead writer began, or create it."""
        if claim.partial.exists():
            try:
                return ShardWriter(claim.partial)
            except CacheError:  # killed while it was created
                claim.partial.unlink()
        space = self.work.space
        header = ShardHeader(
            space.space_id, space.spec, len(claim.keys), space.width, space.dtype, dict(self.encoder.versions)
        )
        flags = np.where(window.truncated, TRUNCATED, 0).astype(np.uint8)
        with self.summary.timed("write"):
            create_shard(claim.partial, header, claim.keys, window.n_tokens, flags)
        return ShardWriter(claim.partial)

    def _forward_all(
        self, window: TokenizedTexts, batches: list[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[npt.NDArray[np.int64], _Forward]]:
        """Yield batches in order with what returns their vectors; several workers compute ahead where that pays."""

        def forward(rows: npt.NDArray[np.int64]) -> torch.Tensor:
            return self.encoder.encode(window, rows, self.work.role)

        workers = self.encoder.workers
        if workers == 1:
            yield from ((rows, functools.partial(forward, rows)) for rows in batches)
            return
        threads = torch.get_num_threads()
        share = max(1, threads // workers)
        pool = ThreadPoolExecutor(workers, "palcache-forward", initializer=torch.set_num_threads, initargs=(share,))
        try:
            futures = [(rows, pool.submit(forward, rows)) for rows in batches]
            yield from ((rows, future.result) for rows, future in futures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # a worker's share becomes the default of the process

    def _encode_batch(
        self, writer: ShardWriter, window: TokenizedTexts, rows: npt.NDArray[np.int64], forward: _Forward
    ) -> None:
        try:
            with self.summary.timed("forward"):
                stored, norms = to_stored(forward(), self.work.space.dtype)
        except _UnfitRowError as error:
            row = int(rows[error.row])
            start = " ".join(window.texts[row].split())[:60]
            raise NumericsError(
                f"{error}, first at row {row} of shard {writer.path.stem} in the {self.work.role} space (text {start!r})."
            ) from error
        except Exception as error:
            if len(rows) == 1:
                self._fail(writer, window, rows, error)
                return
            if _is_out_of_memory(error):
                self.budget = max(1, self.budget // 2)
                _free_cached_memory()
            for half in np.array_split(rows, 2):
                self._encode_batch(
                    writer, window, half, functools.partial(self.encoder.encode, window, half, self.work.role)
                )
            return
        with self.summary.timed("write"):
            writer.write(rows, stored, norms)
        self._advance(len(rows), int(window.n_tokens[rows].sum()))

    def _fail(self, writer: ShardWriter, window: TokenizedTexts, rows: npt.NDArray[np.int64], error: Exception) -> None:
        """Record a text that cannot be encoded and go on without it; an encoder that fails on everything stops."""
        if self.summary.failed >= MAX_FAILURES and not self.summary.encoded:
            raise ModelError(
                f"The encoder fails on every text ({type(error).__name__}: {error}); see {self.work.space.folder}/failed.jsonl."
            ) from error
        row = int(rows[0])
        writer.fail(row)
        line = {
            "error": f"{type(error).__name__}: {error}",
            "key": hex_key(writer.keys[row]),
            "text": window.texts[row],
        }
        with (self.work.space.folder / "failed.jsonl").open("ab") as file:
            file.write(canonical_json(line) + b"\n")
        self.summary.failed += 1

    def _advance(self, texts: int, tokens: int) -> None:
        self._texts += texts
        self._tokens += tokens
        self.summary.encoded += texts
        self.summary.tokens += tokens
        self._report(waiting=False)

    def _report(self, *, waiting: bool) -> None:
        if self.on_progress:
            rate = self._known_tokens / max(1, self._known_texts)
            total = self._known_tokens + round(rate * max(0, self._texts_total - self._known_texts))
            self.on_progress(
                EmbedProgress(
                    self.work.role, self._texts, self._texts_total, self._tokens, total, self._started, waiting=waiting
                )
            )


class _UnfitRowError(NumericsError):
    """A vector that cannot be stored, with its place in the batch."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def to_stored(vectors: torch.Tensor, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Return vectors as they are stored, and their norms before.

    Args:
        vectors: (m, d) float32.
        dtype: `float32`, `float16` or `bfloat16` (returned as its bits in uint16).

    Raises:
        NumericsError: a value is not finite, or beyond the range of float16.
    """
    vectors = vectors.float()
    norms = torch.linalg.vector_norm(vectors, dim=1)
    good = torch.isfinite(norms)
    if not bool(good.all()):
        row = int(torch.nonzero(~good)[0])
        raise _UnfitRowError("A vector is not finite; use --compute-dtype float32 (or bfloat16)", row)
    if dtype == "float16":
        small = vectors.abs().amax(dim=1) <= torch.finfo(torch.float16).max
        if not bool(small.all()):
            row = int(torch.nonzero(~small)[0])
            raise _UnfitRowError(
                "A value of a vector is beyond the range of float16 (65504); use --dtype bfloat16", row
            )
        stored: npt.NDArray[Any] = vectors.half().cpu().numpy()
    elif dtype == "bfloat16":
        stored = vectors.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)
    else:
        stored = vectors.cpu().numpy()
    return stored, norms.cpu().numpy()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _free_cached_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
