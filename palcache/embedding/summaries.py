"""What an embed did, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from palcache.encoders import Role


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
        new_bytes: bytes of shards written.
        token_bytes: of these, bytes of token states; of a plan alone.
        cosines: lowest cosine of stored vectors to what was computed, over a sample of the rows written, by role.
        seconds: wall time by stage: read, model, keys, encode, total; inside encode: tokenize (beside the rest), wait (for
            tokenised texts), forward (for vectors), write, others (for other writers), and device (computing, beside the
            rest). Of several workers the sums, except for total.
        workers: processes that encoded.
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
    token_bytes: int = 0
    cosines: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    spaces: dict[str, str] = field(default_factory=dict)
    workers: int = 1

    @property
    def idle_share(self) -> float | None:
        """Share of the time of encoding in which the device computed nothing; None where nothing was encoded.

        Time spent waiting for other writers is left out. On a CPU, preparing a batch counts as computing.
        """
        at_work = self.seconds.get("encode", 0.0) - self.seconds.get("others", 0.0)
        if not self.encoded or at_work <= 0:
            return None
        return min(1.0, max(0.0, 1.0 - self.seconds.get("device", 0.0) / at_work))

    @property
    def repeats_saved(self) -> int:
        """References that needed no encoding of their own."""
        return self.references - self.encoded

    def add_cosines(self, role: Role, cosines: npt.NDArray[np.float32]) -> None:
        """Note the lowest of some cosines for a role."""
        if len(cosines):
            self.cosines[role] = min(self.cosines.get(role, 1.0), float(cosines.min()))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(stage, time.perf_counter() - start)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add wall time to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def add_work(self, other: EmbedSummary) -> None:
        """Add what another process encoded."""
        for name in ("encoded", "failed", "truncated", "tokens", "padded", "new_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for stage, seconds in other.seconds.items():
            self.add_seconds(stage, seconds)
        for role, cosine in other.cosines.items():
            self.cosines[role] = min(self.cosines.get(role, 1.0), cosine)


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


OnProgress = Callable[[EmbedProgress], None]
