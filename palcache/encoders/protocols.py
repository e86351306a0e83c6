"""What stage 1 asks of an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

Role = Literal["prompt", "response", "joint"]
"""What an item is: a prompt, a response, or a prompt and a response that go through the model together."""
KeptTokens = Literal["all", "responses"]
"""Which tokens' states are kept: those of the whole item, or of a joint item's response."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class TokenizedTexts:
    """A window of tokenised texts.

    Attributes:
        texts: the texts, N of them.
        n_tokens: tokens per text after truncation, special tokens included, (N,).
        truncated: the text was longer than the encoder's limit, (N,).
        offsets: where each text's tokens begin in the arrays of `features`, (N + 1,).
        features: token arrays by name (`input_ids`, ...), each (T,) int64, unpadded; empty where the encoder prepares
            texts batch by batch.
        prompt_tokens: of a joint item, tokens that end within its prompt, (N,); None for other roles.
        errors: what the tokenizer said of the texts that it could not read, by row; they have no tokens.
    """

    texts: Sequence[str]
    n_tokens: npt.NDArray[np.uint32]
    truncated: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    features: Mapping[str, npt.NDArray[np.int64]]
    prompt_tokens: npt.NDArray[np.uint32] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)

    def first_kept(self, kept: KeptTokens) -> npt.NDArray[np.int64]:
        """Return each row's first token whose state is kept, counted within the row, (N,)."""
        if kept == "all" or self.prompt_tokens is None:
            return np.zeros(len(self.n_tokens), np.int64)
        return np.minimum(self.prompt_tokens, self.n_tokens).astype(np.int64)


@final
@dataclass(frozen=True, slots=True, eq=False)
class States:
    """What one forward pass gives of m rows.

    Attributes:
        pooled: one vector a row, (m, d) float32.
        prompt: of joint items on a causal model, the state at the prompt's last token, (m, d) float32.
        tokens: the kept tokens' states, row after row, (t, d) float32.
    """

    pooled: torch.Tensor
    prompt: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


class Encoder(Protocol):
    """Turns texts into vectors; the same texts give the same vectors whatever the batch, within rounding."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Names and revisions that say where the encoder came from and are no part of its identity."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Libraries and device, for the record in each shard."""

    @property
    def width(self) -> int:
        """Number of values in a vector, d."""

    @property
    def token_budget(self) -> int:
        """Padded tokens per batch that suit the device."""

    @property
    def workers(self) -> int:
        """How many threads may call `encode` at once with profit; 1 on a GPU."""

    @property
    def equal_lengths(self) -> bool:
        """Batches must hold texts of one token count, because padding would change the vectors."""

    def spec(self, role: Role) -> dict[str, Any]:
        """Return everything that changes the meaning of a vector in a role, as JSON values."""

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:
        """Tokenise texts; may run in a thread beside `encode`."""

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return the vectors of some rows of a window, (m, d) float32 on the encoder's device."""


@runtime_checkable
class StateEncoder(Encoder, Protocol):
    """An encoder that can also give the states of single tokens, and read a prompt and a response together."""

    def tokenize_pairs(self, prompts: Sequence[str], responses: Sequence[str]) -> TokenizedTexts:
        """Tokenise joint items; may run in a thread beside `encode_states`."""

    def encode_states(
        self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role, *, kept: KeptTokens | None = None
    ) -> States:
        """Return the vectors of some rows of a window, and the kept tokens' states where they are asked for."""
