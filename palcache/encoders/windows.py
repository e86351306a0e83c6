"""Windows of tokenised texts: how they are made by a tokenizer, and how padded batches are cut out of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from palcache.encoders.protocols import TokenizedTexts

Rows = npt.NDArray[np.int64]


class UnreadableTextError(ValueError):
    """A text of which the tokenizer makes no tokens."""


def tokenize_window(
    tokenizer: Any,
    texts: Sequence[str],
    limit: int | None,
    *,
    special_tokens: bool = True,
    broken: Mapping[int, str] | None = None,
) -> tuple[TokenizedTexts, list[Any]]:
    """Return a window of texts, and the tokenizer's own encoding of each; a text that breaks it has no tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        texts: N texts.
        limit: tokens per text, at most; special tokens included.
        special_tokens: add those that the model wants; False where a chat template has written them.
        broken: rows that are known to have no tokens, and why.
    """
    options = {
        "padding": False,
        "truncation": limit is not None,
        "max_length": limit,
        "add_special_tokens": special_tokens,
    }
    errors = dict(broken or {})
    try:
        encoded = tokenizer(list(texts), **options)
    except Exception:
        texts, found = _without_broken(tokenizer, texts, options)
        errors = found | errors
        encoded = tokenizer(list(texts), **options)
    encodings: list[Any] = encoded.encodings
    lengths = np.fromiter((len(row) for row in encoded["input_ids"]), np.int64, len(texts))
    truncated = np.fromiter((bool(encoding.overflowing) for encoding in encodings), bool, len(texts))
    names = [name for name in encoded if name != "attention_mask"]
    rows = {name: [[] if row in errors else values for row, values in enumerate(encoded[name])] for name in names}
    lengths[list(errors)] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    features = {
        name: np.fromiter(itertools.chain.from_iterable(values), np.int64, int(offsets[-1]))
        for name, values in rows.items()
    }
    return TokenizedTexts(texts, lengths.astype(np.uint32), truncated, offsets, features, errors=errors), encodings


def _without_broken(
    tokenizer: Any, texts: Sequence[str], options: Mapping[str, Any]
) -> tuple[list[str], dict[int, str]]:
    """Return the texts with a stand-in for each that breaks the tokenizer, and what it said of those."""
    sound, errors = list(texts), {}
    for row, text in enumerate(texts):
        try:
            tokenizer([text], **options)
        except Exception as error:
            sound[row], errors[row] = "a", f"{type(error).__name__}: {error}"
    return sound, errors


def require_tokens(window: TokenizedTexts, rows: Rows) -> None:
    """Refuse rows without tokens.

    Raises:
        UnreadableTextError: the tokenizer failed on a text, or made no token of it.
    """
    for row in rows[window.n_tokens[rows] == 0].tolist():
        said = window.errors.get(row)
        raise UnreadableTextError(f"the tokenizer failed on the text ({said})" if said else "the text has no tokens")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; to CUDA it goes from pinned memory, as only then the CPU need not wait for the device.

    The memory is not used again before the copy has ended: PyTorch's allocator of pinned memory sees to it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def row_tokens(window: TokenizedTexts, rows: Rows, first: Rows | None = None) -> tuple[Rows, Rows]:
    """Return where the tokens of some rows stand in the window's arrays, row after row, and each row's count.

    Args:
        window: the texts.
        rows: row numbers, (m,).
        first: leave out this many tokens at the start of each, (m,).
    """
    lengths = window.n_tokens[rows].astype(np.int64)
    starts = window.offsets[rows]
    if first is not None:
        starts, lengths = starts + first, lengths - first
    begins = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    return np.arange(int(lengths.sum())) + np.repeat(starts - begins, lengths), lengths


def pad_window(
    window: TokenizedTexts, rows: Rows, padding: Mapping[str, int], *, left: bool = False
) -> dict[str, torch.Tensor]:
    """Return the padded features of some rows and their attention mask, each (m, t) int64.

    Args:
        window: the texts.
        rows: row numbers, (m,).
        padding: value of the padding by feature; 0 for others.
        left: pad before the tokens.
    """
    source, lengths = row_tokens(window, rows)
    longest, column = int(lengths.max()), np.arange(int(lengths.max()))
    inside = column >= longest - lengths[:, None] if left else column < lengths[:, None]
    out = {"attention_mask": torch.from_numpy(inside.astype(np.int64))}
    for name, values in window.features.items():
        padded = np.full((len(rows), longest), padding.get(name, 0), np.int64)
        padded[inside] = values[source]
        out[name] = torch.from_numpy(padded)
    return out
