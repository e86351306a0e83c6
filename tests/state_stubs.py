"""A stand-in for encoders of hidden states: a state per word, without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.encoders import KeptTokens, Role, StateEncoder, States, TokenizedTexts
from tests.stubs import append_lines

MAX_WORDS = 12


@final
@dataclass(eq=False)
class StubStateEncoder:
    """A causal model: a word's state is hashed from the words up to it; a row's vector is its last word's state.

    Attributes:
        width: number of values in a state.
        identity: part of the spec; another one is another encoder.
        library: version that shards record.
        fails_on: texts that cannot be encoded.
        log: a file to which the texts of each batch are appended, one line a text.
    """

    width: int = 5
    identity: str = "states"
    library: str = "1"
    fails_on: frozenset[str] = frozenset()
    log: Path | None = None
    token_budget = 40
    workers = 1
    equal_lengths = False

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
        spec = {
            "encoder": "stub-states",
            "identity": self.identity,
            "compute_dtype": "float32",
            "max_tokens": MAX_WORDS,
        }
        return {**spec, "prompt_state": True} if role == "joint" else spec

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:  # noqa: ARG002 - the protocol's
        """Make a token of each word."""
        words = [text.split() for text in texts]
        counts = np.array([min(len(row), MAX_WORDS) for row in words], np.int64)
        ids = [_word_id(word) for row in words for word in row[:MAX_WORDS]]
        return TokenizedTexts(
            texts,
            counts.astype(np.uint32),
            np.array([len(row) > MAX_WORDS for row in words]),
            np.concatenate([[0], np.cumsum(counts)]),
            {"input_ids": np.array(ids, np.int64)},
        )

    def tokenize_pairs(self, prompts: Sequence[str], responses: Sequence[str]) -> TokenizedTexts:
        """Make a token of each word of prompt and response."""
        window = self.tokenize([f"{a} {b}" for a, b in zip(prompts, responses, strict=True)], "joint")
        before = np.array([len(prompt.split()) for prompt in prompts], np.uint32)
        return TokenizedTexts(
            window.texts,
            window.n_tokens,
            window.truncated,
            window.offsets,
            window.features,
            np.minimum(before, window.n_tokens),
        )

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return the last words' states."""
        return self.encode_states(window, rows, role).pooled

    def encode_states(
        self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role, *, kept: KeptTokens | None = None
    ) -> States:
        """Return pooled vectors, prompt states of joint items, and kept states."""
        texts = [window.texts[row] for row in rows]
        if bad := self.fails_on.intersection(texts):
            raise ValueError(f"cannot encode {min(bad)}")
        if self.log is not None:
            append_lines(self.log, texts)
        states = [self.states(text, role) for text in texts]
        prompt = None
        if window.prompt_tokens is not None:
            prompt = torch.stack([s[int(window.prompt_tokens[row]) - 1] for s, row in zip(states, rows, strict=True)])
        tokens = None
        if kept is not None:
            first = window.first_kept(kept)
            tokens = torch.cat([s[int(first[row]) :] for s, row in zip(states, rows, strict=True)])
        return States(torch.stack([s[-1] for s in states]), prompt, tokens)

    def states(self, text: str, role: Role) -> torch.Tensor:
        """Return the states of a text's words, (t, d)."""
        words = text.split()[:MAX_WORDS]
        rows = []
        for end in range(1, len(words) + 1):
            key = f"{self.identity}|{role}|{' '.join(words[:end])}".encode()
            rows.append(np.frombuffer(hashlib.shake_128(key).digest(2 * self.width), "<i2").astype(np.float32) / 2**15)
        return torch.from_numpy(np.stack(rows))


def _word_id(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=2).digest(), "little")


def as_state_encoder(stub: StubStateEncoder) -> StateEncoder:
    """Return the stub as what it stands for; mypy checks that it fits."""
    return stub
