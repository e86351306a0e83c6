"""Fill one space: claim shards, tokenise ahead in a thread, encode, seal."""

from __future__ import annotations

import contextlib
import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, final

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache
from palcache.configs import EmbedConfig
from palcache.devices import free_cached_memory, is_out_of_memory
from palcache.embedding.batching import padded_tokens, plan_batches
from palcache.embedding.forwards import Forward, Forwards, Rows
from palcache.embedding.summaries import EmbedProgress, EmbedSummary, OnProgress
from palcache.embedding.works import Work, token_rows
from palcache.encoders import Encoder, TokenizedTexts
from palcache.errors import CacheError, ModelError, NumericsError
from palcache.files import storage_errors
from palcache.fingerprints import KEY_BYTES, canonical_json, hex_key
from palcache.storage.claims import Claim, adoptable, make_claim, next_sequence, survey
from palcache.storage.datasets import ShardHeader
from palcache.storage.indexes import KeyIndex
from palcache.storage.layouts import create_shard
from palcache.storage.locks import locked
from palcache.storage.numerics import UnfitRowError
from palcache.storage.shards import FAILED, TRUNCATED, Shard, ShardWriter

__all__ = ["MAX_FAILURES", "WAIT_SECONDS", "SpaceWriter", "Work"]

WAIT_SECONDS: Final = 0.5
MAX_FAILURES: Final = 8
"""Texts that may fail in a row before the encoder has to show that it still works."""


@final
class SpaceWriter:
    """Fills one space until every wanted text is in a sealed shard.

    Args:
        work: the texts.
        encoder: the model.
        cache: for the journal.
        config: `shard_rows` and `token_budget` are used.
        summary: is added to.
        on_progress: called after each batch.
    """

    def __init__(
        self,
        work: Work,
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
        self.forwards = Forwards(functools.partial(work.encode, encoder), encoder.workers)
        self._sealed: set[str] | None = None
        self._held: list[Claim] = []
        self._failures = 0  # texts in a row
        self._encoded: tuple[TokenizedTexts, int] | None = None  # the last window and row that went well
        self._texts = self._tokens = 0
        self._texts_total = int((work.space.find(work.keys) < 0).sum())
        self._known_tokens = self._known_texts = 0
        self._started = time.perf_counter()

    def run(self, *, wait: bool = True) -> bool:
        """Encode until every wanted key is in a sealed shard, by this writer or another, and return True.

        Args:
            wait: for shards that other writers work on; otherwise return False where only those are left.

        Raises:
            ModelError: the encoder fails on text after text.
            NumericsError: a vector is not finite or does not fit the stored type.
            StorageError: the disk is full or read-only.
        """
        with self.summary.timed("encode"), ThreadPoolExecutor(1, thread_name_prefix="palcache-tokenize") as ahead:
            busy = self.forwards.clock.seconds
            try:
                return self._run(ahead, wait=wait)
            finally:
                ahead.shutdown(wait=True, cancel_futures=True)
                for claim in self._held:
                    claim.release()
                self.summary.add_seconds("device", self.forwards.clock.seconds - busy)

    def _run(self, ahead: ThreadPoolExecutor, *, wait: bool) -> bool:
        upcoming: Future[tuple[Claim, TokenizedTexts] | None] = ahead.submit(self._next)
        while True:
            with self.summary.timed("wait"):
                current = upcoming.result()
            if current is not None:
                upcoming = ahead.submit(self._next)
                self._encode_shard(*current)
                continue
            if self._all_sealed():
                return True
            if not wait:
                return False
            self._report(waiting=True)
            with self.summary.timed("others"):
                time.sleep(WAIT_SECONDS)
            upcoming = ahead.submit(self._next)

    @property
    def missing(self) -> int:
        """Texts that the space lacked when it was opened."""
        return self._texts_total

    def _next(self) -> tuple[Claim, TokenizedTexts] | None:
        """Claim and tokenise the next shard; None when nothing is left to claim."""
        claim = self._claim()
        if claim is None:
            return None
        start = time.perf_counter()
        window = self.work.tokenize(self.encoder, self.wanted.find(claim.keys))
        self.summary.add_seconds("tokenize", time.perf_counter() - start)
        return claim, window

    def _claim(self) -> Claim | None:
        """Go on with a dead writer's shard, or claim new keys that no living writer has."""
        folder = self.work.space.shard_folder
        with locked(self.work.space.folder / ".lock"):
            standing = survey(folder)  # before the look at sealed shards: a claim ends when its shard is sealed
            self.todo[self._sealed_rows(folder)] = False
            adopted: Claim | None = None
            for claim in standing.stale:
                if adopted is None and adoptable(claim, self.wanted):
                    adopted = claim
                else:
                    claim.release()
            if adopted is None:
                free = self.todo.copy()
                taken = self.wanted.find(standing.live)
                free[taken[taken >= 0]] = False
                rows = np.flatnonzero(free)
                if not len(rows):
                    return None
                rows = rows[: self.work.shard_size(rows, self.config.shard_rows)]
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
        fitting = (part for rows in batches for part in self._fit(window, rows))
        for rows, forward in self.forwards.all(window, fitting):
            self._encode_batch(writer, window, rows, forward)
        with self.summary.timed("write"):
            self._seal(claim, writer)
        self._held.remove(claim)
        self.summary.truncated += int(window.truncated.sum())

    def _seal(self, claim: Claim, writer: ShardWriter) -> None:
        """Make the shard one of the cache; one without a single vector is left out, and its texts stay to be retried."""
        if writer.all_failed():
            self.todo[self.wanted.find(claim.keys)] = False
            claim.drop()
            return
        path = claim.commit(writer.seal())
        self.cache.record(self.work.space.space_id, path, writer.header.rows)
        self.summary.new_bytes += path.stat().st_size
        self.summary.add_cosines(self.work.role, Shard(path).cosines)

    def _open_shard(self, claim: Claim, window: TokenizedTexts) -> ShardWriter:
        """Go on with the shard that a dead writer began, if it had the same libraries and device; else create it."""
        versions = dict(self.encoder.versions)
        if claim.partial.exists():
            with contextlib.suppress(CacheError):  # damaged: made anew
                writer = ShardWriter(claim.partial)
                if writer.header.versions == versions and np.array_equal(writer.keys, claim.keys):
                    writer.retry_failed()
                    return writer
        space = self.work.space
        header = ShardHeader(space.space_id, space.spec, len(claim.keys), space.width, space.dtype, versions)
        flags = np.where(window.truncated, TRUNCATED, 0).astype(np.uint8)
        with self.summary.timed("write"):
            create_shard(
                claim.partial,
                header,
                claim.keys,
                window.n_tokens,
                flags,
                prompt_tokens=window.prompt_tokens,
                tokens=token_rows(window, self.work.kept),
            )
        return ShardWriter(claim.partial)

    def _fit(self, window: TokenizedTexts, rows: Rows) -> list[Rows]:
        """Return a batch in parts that fit the budget, if it was halved since the batch was planned."""
        parts = -(-padded_tokens(window.n_tokens, [rows]) // self.budget)
        return np.array_split(rows, min(len(rows), max(1, parts)))

    def _encode_batch(self, writer: ShardWriter, window: TokenizedTexts, rows: Rows, forward: Forward) -> None:
        """Encode and store a batch; one that fails is halved until the texts that fail stand alone."""
        error = self._try_batch(writer, window, rows, forward)
        if error is None:
            return
        if len(rows) == 1:
            self._fail(writer, window, int(rows[0]), error)
            return
        if is_out_of_memory(error):
            self.budget = max(1, min(self.budget, padded_tokens(window.n_tokens, [rows]) // 2))
            free_cached_memory()
        for part in (part for half in np.array_split(rows, 2) for part in self._fit(window, half)):
            again = functools.partial(self.forwards.one, window, part)
            self._encode_batch(writer, window, part, again)

    def _try_batch(self, writer: ShardWriter, window: TokenizedTexts, rows: Rows, forward: Forward) -> Exception | None:
        """Encode and store a batch; return what the encoder raised, if anything."""
        try:
            with self.summary.timed("forward"):
                stored, more = self.work.to_stored(forward(), window, rows)
        except UnfitRowError as error:
            row = int(rows[error.row])
            raise NumericsError(
                f"{error}: row {row} of shard {writer.path.stem} in the {self.work.role} space, the text "
                f"{_start(window.texts[row])}; {self._remedy(error)}."
            ) from error
        except Exception as error:
            return error.with_traceback(None)  # its frames hold the batch's tensors, and the next try needs the memory
        with self.summary.timed("write"):
            writer.write(rows, stored.values, stored.norms, more)
        self._failures, self._encoded = 0, (window, int(rows[0]))
        self.summary.encoded += len(rows)
        self._advance(len(rows), int(window.n_tokens[rows].sum()))
        return None

    def _remedy(self, error: UnfitRowError) -> str:
        if error.finite:
            return "store with --dtype bfloat16"
        if self.work.space.spec.get("compute_dtype") == "float16":
            return "compute with --compute-dtype bfloat16 or float32"
        return "compute with --compute-dtype float32, and leave the text out if it is so already"

    def _fail(self, writer: ShardWriter, window: TokenizedTexts, row: int, error: Exception) -> None:
        """Record a text that cannot be encoded and go on without it."""
        line = {
            "error": f"{type(error).__name__}: {error}",
            "key": hex_key(writer.keys[row]),
            "text": window.texts[row],
        }
        self._report_failed(canonical_json(line) + b"\n")
        writer.fail(row)
        self.summary.failed += 1
        self._failures += 1
        if self._failures % MAX_FAILURES == 0:
            self._require_sound_encoder(window)
        self._advance(1, int(window.n_tokens[row]))

    def _report_failed(self, line: bytes) -> None:
        """Append a line to `failed.jsonl`, once: a run that resumes may fail on the same text again."""
        folder = self.work.space.folder
        path = folder / "failed.jsonl"
        with locked(folder / ".lock"), storage_errors(path):
            before = path.read_bytes() if path.exists() else b""
            if line not in before.splitlines(keepends=True):
                with path.open("ab") as file:
                    file.truncate(before.rfind(b"\n") + 1)  # without a line that a full disk cut short
                    file.write(line)

    def _require_sound_encoder(self, window: TokenizedTexts) -> None:
        """Encode a text that went well before, else the shortest: does the encoder fail on these texts, or on all?"""
        window, row = self._encoded or (window, int(window.n_tokens.argmin()))
        try:
            self.work.encode(self.encoder, window, np.array([row]))
        except Exception as error:
            raise ModelError(
                f"The encoder failed on {self._failures} texts in a row, and on {_start(window.texts[row])} too "
                f"({type(error).__name__}: {error}); see {self.work.space.folder}/failed.jsonl, mend the model or the "
                "device, and run the same command again."
            ) from error

    def _advance(self, texts: int, tokens: int) -> None:
        self._texts += texts
        self._tokens += tokens
        self.summary.tokens += tokens
        for claim in tuple(self._held):
            claim.beat()
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


def _start(text: str) -> str:
    """Return the beginning of a text, quoted, for messages."""
    return repr(" ".join(text.split())[:60])
