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
    token_bytes: int = 0
    cosines: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    spaces: dict[str, str] = field(default_factory=dict)

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


OnProgress = Callable[[EmbedProgress], None]
