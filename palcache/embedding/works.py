"""What is to be encoded into one space: texts or pairs of texts, and how they are tokenised, encoded and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from palcache.cache import Space
from palcache.configs import StoredDtype
from palcache.encoders import Encoder, KeptTokens, Role, StateEncoder, States, TokenizedTexts
from palcache.encoders.windows import row_tokens
from palcache.errors import InputError
from palcache.fingerprints import Keys
from palcache.storage.datasets import (
    COSINE,
    FILE_DTYPES,
    POOLED,
    PROMPT,
    SCALES,
    TOKEN_SHARD_BYTES,
    TOKENS,
    Array,
    TokenRows,
    sampled_rows,
)
from palcache.storage.numerics import StoredVectors, UnfitRowError, stored_cosines, to_stored

_Rows = npt.NDArray[np.int64]
BYTES_PER_TOKEN: Final = 3
"""Of UTF-8, to estimate what token states will take; on the low side, so that shards turn out smaller, not larger."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The texts of one role that a space may lack.

    Attributes:
        role: prompt, response or joint.
        space: where they go, as it stood at the start.
        texts: the distinct texts, or the responses of the distinct pairs, (m,).
        keys: their keys, (m, 16).
        prompts: the prompts of the distinct pairs, (m,); None for other roles.
    """

    role: Role
    space: Space
    texts: pa.Array
    keys: Keys
    prompts: pa.Array | None = None

    @property
    def kept(self) -> KeptTokens | None:
        """Which tokens' states the space keeps."""
        kept: KeptTokens | None = self.space.spec.get("tokens")
        return kept

    def tokenize(self, encoder: Encoder, rows: _Rows) -> TokenizedTexts:
        """Return some of the texts as tokens."""
        return tokenize_items(encoder, self.role, self.texts, self.prompts, rows)

    def encode(self, encoder: Encoder, window: TokenizedTexts, rows: _Rows) -> States:
        """Return what the encoder makes of some rows of a window."""
        if self.kept is None and self.prompts is None:
            return States(encoder.encode(window, rows, self.role))
        return as_state_encoder(encoder, self.role).encode_states(window, rows, self.role, kept=self.kept)

    def shard_size(self, rows: _Rows, most: int) -> int:
        """Return how many of some rows, in order, make a shard: `most`, or fewer where many token states are kept."""
        if self.kept is None or not len(rows):
            return most
        at = pa.array(rows[:most])
        texts = [self.texts] if self.prompts is None else [self.texts, self.prompts]
        lengths = sum(pc.binary_length(text.take(at).cast(pa.large_string())).to_numpy() for text in texts)
        tokens = np.minimum(lengths // BYTES_PER_TOKEN + 2, self.space.spec.get("max_tokens") or 2**31)
        value = np.dtype(FILE_DTYPES[self.space.dtype]).itemsize
        return max(1, int((np.cumsum(tokens) * self.space.width * value <= TOKEN_SHARD_BYTES).sum()))

    def to_stored(self, states: States, window: TokenizedTexts, rows: _Rows) -> tuple[StoredVectors, dict[str, Array]]:
        """Return a batch's pooled vectors as they are stored, and by dataset what stands beside them.

        Raises:
            UnfitRowError: a vector cannot be stored; its place is that of its row in the batch.
        """
        dtype = self.space.dtype
        pooled = to_stored(states.pooled, dtype)
        parts = {POOLED: pooled}
        if self.space.spec.get("prompt_state") and states.prompt is not None:
            parts[PROMPT] = to_stored(states.prompt, dtype)
        if self.kept is not None and states.tokens is not None:
            try:
                parts[TOKENS] = to_stored(states.tokens, dtype)
            except UnfitRowError as error:
                counts = window.n_tokens[rows] - window.first_kept(self.kept)[rows]
                row = int(np.searchsorted(np.cumsum(counts), error.row, side="right"))
                raise UnfitRowError(str(error), row, finite=error.finite) from error
        more: dict[str, Array] = {name: part.values for name, part in parts.items() if name != POOLED}
        more |= {SCALES[name]: part.scales for name, part in parts.items() if part.scales is not None}
        if dtype != "float32":
            more[COSINE] = _sample_cosines(states.pooled, dtype, np.isin(rows, sampled_rows(len(window.n_tokens))))
        return pooled, more


def _sample_cosines(vectors: torch.Tensor, dtype: StoredDtype, sampled: npt.NDArray[np.bool_]) -> Array:
    """Return the cosines of stored to computed vectors where they are sampled, (m,); NaN elsewhere."""
    found = np.full(len(sampled), np.nan, np.float32)
    if sampled.any():
        found[sampled] = stored_cosines(vectors[torch.from_numpy(sampled)], dtype)
    return found


def token_rows(window: TokenizedTexts, kept: KeptTokens | None) -> TokenRows | None:
    """Return which tokens of a window have their states kept, and their ids; None where none are kept."""
    if kept is None:
        return None
    places, lengths = row_tokens(window, np.arange(len(window.n_tokens)), window.first_kept(kept))
    return TokenRows(np.concatenate([[0], np.cumsum(lengths)]), window.features["input_ids"][places].astype(np.uint32))


def tokenize_items(
    encoder: Encoder, role: Role, texts: pa.Array, prompts: pa.Array | None, rows: _Rows
) -> TokenizedTexts:
    """Return some of the texts, or of the pairs of a prompt and a text, as tokens."""
    at = pa.array(rows)
    picked = texts.take(at).to_pylist()
    if prompts is None:
        return encoder.tokenize(picked, role)
    return as_state_encoder(encoder, "joint").tokenize_pairs(prompts.take(at).to_pylist(), picked)


def as_state_encoder(encoder: Encoder, what: str) -> StateEncoder:
    """Return an encoder that gives token states and reads prompt and response together.

    Raises:
        InputError: it does not.
    """
    if not isinstance(encoder, StateEncoder):
        raise InputError(
            f"The encoder {encoder.about.get('model')} gives one vector a text, and {what} items or token states need "
            "hidden states; add --encoder hidden."
        )
    return encoder
