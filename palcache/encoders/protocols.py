"""What stage 1 asks of an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

import numpy as np
import numpy.typing as npt
import torch

Role = Literal["prompt", "response"]


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
    """

    texts: Sequence[str]
    n_tokens: npt.NDArray[np.uint32]
    truncated: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    features: Mapping[str, npt.NDArray[np.int64]]


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
