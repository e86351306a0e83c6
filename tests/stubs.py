"""Stand-ins for the tests of stage 1: an encoder without a model, small tables, and what to compare."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.comparisons import Comparisons
from palcache.encoders import Encoder, Role, TokenizedTexts

MAX_WORDS = 9


@final
@dataclass(eq=False)
class StubEncoder:
    """Vectors from hashed texts: a word is a token, at most `MAX_WORDS` of them.

    Attributes:
        width: number of values in a vector.
        token_budget: padded words per batch.
        workers: threads that may encode at once.
        equal_lengths: batches hold texts of one length.
        identity: part of the spec; another one is another encoder.
        compute_dtype: part of the spec.
        library: version that shards record.
        seconds: how long a batch takes.
        batch_sensitive: vectors depend on the size of the batch, as those of real models do in the last bits.
        scale: what vectors are multiplied with.
        fails_on: texts that cannot be encoded.
        nan_on: texts whose vector is not a number.
        huge_on: texts whose vector does not fit float16.
        memory: padded words that fit the memory; more raise `torch.OutOfMemoryError`.
        log: a file to which the texts of each batch are appended, one line a text.
        batches: sizes of the batches asked for, failed ones included.
        overflows: how many of them did not fit the memory.
    """

    width: int = 6
    token_budget: int = 24
    workers: int = 1
    equal_lengths: bool = False
    identity: str = "stub"
    compute_dtype: str = "float32"
    library: str = "1"
    seconds: float = 0.0
    batch_sensitive: bool = True
    scale: float = 1.0
    fails_on: frozenset[str] = frozenset()
    nan_on: frozenset[str] = frozenset()
    huge_on: frozenset[str] = frozenset()
    memory: int | None = None
    log: Path | None = None
    batches: list[int] = field(default_factory=list)
    overflows: int = 0

    @property
    def about(self) -> Mapping[str, Any]:
        """Where it came from."""
        return {"model": self.identity, "revision": None}

    @property
    def versions(self) -> Mapping[str, str]:
        """Libraries and device."""
        return {"stub": self.library, "device": "none"}

    def spec(self, role: Role) -> dict[str, Any]:
        """Return what changes the meaning of a vector."""
        prefix = "query: " if role == "prompt" else ""
        return {"encoder": "stub", "identity": self.identity, "prefix": prefix, "compute_dtype": self.compute_dtype}

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:
        """Count words; a prompt has one more, for its prefix."""
        words = np.array([len(text.split()) + (role == "prompt") for text in texts])
        counts = np.minimum(words, MAX_WORDS).astype(np.uint32)
        return TokenizedTexts(texts, counts, words > MAX_WORDS, np.zeros(1, np.int64), {})

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return hashed vectors, or do what was asked for."""
        texts = [window.texts[row] for row in rows]
        self.batches.append(len(rows))
        if self.seconds:
            time.sleep(self.seconds)
        if self.memory is not None and len(rows) * int(window.n_tokens[rows].max()) > self.memory:
            self.overflows += 1
            raise torch.OutOfMemoryError("stub out of memory")
        if bad := self.fails_on.intersection(texts):
            raise ValueError(f"cannot encode {min(bad)}")
        if self.log is not None:
            append_lines(self.log, texts)
        vectors = np.stack([self.vector(text, role) for text in texts])
        if self.batch_sensitive:
            vectors += len(rows) / 64
        return torch.from_numpy(vectors)

    def vector(self, text: str, role: Role) -> npt.NDArray[np.float32]:
        """Return a text's vector without the influence of its batch."""
        if text in self.nan_on:
            return np.full(self.width, np.nan, np.float32)
        digest = hashlib.shake_128(f"{self.identity}|{role}|{text}".encode()).digest(2 * self.width)
        values = np.frombuffer(digest, "<i2").astype(np.float32) * np.float32(self.scale / 2**15)
        return values * np.float32(2e5) if text in self.huge_on else values


def as_encoder(stub: StubEncoder) -> Encoder:
    """Return the stub as what it stands for; mypy checks that it fits."""
    return stub


_appending = threading.Lock()


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines in one system call, so that those of several processes do not mix."""
    content = "".join(f"{line}\n" for line in lines).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with _appending:
            os.write(descriptor, content)
    finally:
        os.close(descriptor)


def small_table(prompts: int = 5, responses: int = 13, seed: int = 0, label: str = "") -> Comparisons:
    """Return comparisons over distinct prompts and responses of 1 to 12 words; every text occurs at least twice."""
    random = np.random.default_rng(seed)

    def text(kind: str, number: int) -> str:
        return " ".join([f"{kind}{label}{number}", *(f"w{word}" for word in range(random.integers(0, 12)))])

    asked = [text("ask", number) for number in range(prompts)]
    given = [text("say", number) for number in range(responses)]
    rows = [
        {
            "user_id": f"user-{at % 3}",
            "prompt": asked[at % prompts],
            "response_1": given[at % responses],
            "response_2": given[(at + 1 + at // responses) % responses],
            "y": int(random.choice([-1, 1])),
        }
        for at in range(2 * max(prompts, responses) + 1)
    ]
    return Comparisons.from_rows(rows)


def texts_of(table: Comparisons, role: Role) -> list[str]:
    """Return the distinct texts of a role, in order."""
    texts: list[str] = (table.prompts.values if role == "prompt" else table.responses).to_pylist()
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> list[str]:
    """Return the names of the files that are not the same in both."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def flip_bit(path: Path, offset: int, bit: int = 3) -> None:
    """Turn round one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
