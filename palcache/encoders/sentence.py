"""Any sentence-transformers model as an encoder: its own modules, prompts and pooling; our batching.

Texts are tokenised a window at a time and batches are cut out of the window. That this gives what the model's own
`preprocess` gives is checked on the first window; models for which it does not are prepared batch by batch instead.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.configs import EmbedConfig
from palcache.encoders.identities import commit_of, identify
from palcache.encoders.loading import (
    BUNDLED,
    MINILM,
    budget_for,
    library_versions,
    locate,
    quiet,
    resolve_compute_dtype,
    why_not,
    workers_for,
)
from palcache.encoders.packed_linears import pack_linears
from palcache.encoders.protocols import Role, TokenizedTexts
from palcache.encoders.windows import pad_window, require_tokens, tokenize_window
from palcache.errors import InputError, ModelError

__all__ = ["BUNDLED", "MINILM", "SentenceEncoder", "load_encoder", "resolve_compute_dtype"]

PROMPT_NAMES: Final[Mapping[Role, tuple[str, ...]]] = {
    "prompt": ("query",),
    "response": ("document", "passage", "corpus"),
    "joint": (),
}
_TASKS: Final[Mapping[Role, str]] = {"prompt": "query", "response": "document", "joint": "document"}
"""Names under which sentence-transformers models keep their prompts for queries and documents, in its own order."""
_CHECKED_TEXTS: Final = ("Ünïcode, CAPITALS and\n  spaces\t", "word " * 64)
"""Texts beside the window's own on which our preparation of a batch must equal the model's."""


def load_encoder(config: EmbedConfig) -> SentenceEncoder:
    """Load a sentence-transformers model: `minilm`, a folder, or an id on the hub.

    Raises:
        ModelError: the model cannot be found, reached or loaded.
        InputError: the device is not there, or cannot compute in the asked type.
    """
    from palcache.devices import resolve_device

    device = resolve_device(config.device)
    dtype = resolve_compute_dtype(config.compute_dtype, device)
    place, label = locate(config.model)
    with quiet():
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(
                place,
                device="cpu",
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                local_files_only=Path(place).is_dir(),
            )
        except Exception as error:
            raise ModelError(why_not(config.model, place, error)) from error
    return SentenceEncoder(model, label=label, device=device, dtype=dtype, config=config)


@final
class SentenceEncoder:
    """A sentence-transformers model on a device; use `load_encoder` unless you have the model at hand.

    Args:
        model: a loaded `SentenceTransformer`.
        label: its name, for the record.
        device: where to compute.
        dtype: type of the forward pass of the transformer; pooling and what follows are float32.
        config: `max_tokens` is used.

    The encoder takes the model over: it changes its type, device and limits, and speeds up its linear layers.
    """

    def __init__(
        self, model: Any, *, label: str, device: torch.device, dtype: torch.dtype, config: EmbedConfig | None = None
    ) -> None:
        config = config or EmbedConfig()
        self._model, self._label, self._device, self._dtype = model.eval(), label, device, dtype
        if config.max_tokens is not None:
            limit = model.max_seq_length
            if limit is not None and config.max_tokens > limit:
                raise InputError(f"Got max_tokens = {config.max_tokens}; the model {label} reads at most {limit}.")
            model.max_seq_length = config.max_tokens
        self._commit = commit_of(getattr(model[0], "auto_model", None), config.revision)
        self._identity = identify(model, config.revision)
        self._constants: dict[Role, dict[str, Any] | None] = {}
        self._tokenizing = threading.Lock()  # a tokenizer keeps its padding and truncation in itself
        model.float()
        model[0].to(dtype)
        if dtype != torch.float32:
            model[0].register_forward_hook(_to_float32)
        model.to(device)
        if device.type == "cpu":
            pack_linears(model)

    @property
    def about(self) -> Mapping[str, Any]:
        """The model's name, and its commit where it came from the hub."""
        return {"model": self._label, "revision": self._commit}

    @property
    def versions(self) -> Mapping[str, str]:
        """Libraries and device."""
        import sentence_transformers

        return {
            **library_versions(self._device),
            "sentence-transformers": sentence_transformers.__version__,
        }

    @property
    def width(self) -> int:
        """Number of values in a vector, d."""
        get = getattr(self._model, "get_embedding_dimension", None) or self._model.get_sentence_embedding_dimension
        return int(get())

    @property
    def token_budget(self) -> int:
        """Padded tokens per batch: what stays in a CPU's caches, or what fills a GPU."""
        return budget_for(self._device)

    @property
    def workers(self) -> int:
        """Batches side by side on a CPU: they need not wait for each other as the threads of one batch do."""
        return workers_for(self._device)

    @property
    def equal_lengths(self) -> bool:
        """Left padding shifts positions, so a left-padding model gets batches of one length."""
        return getattr(getattr(self._model, "tokenizer", None), "padding_side", "right") == "left"

    def prefix(self, role: Role) -> str:
        """Return the text that the model wants before a query (prompt) or a document (response); often empty."""
        prompts: dict[str, str | None] = self._model.prompts or {}
        for name in PROMPT_NAMES[role]:
            if name in prompts:
                return prompts[name] or ""
        default = self._model.default_prompt_name
        return (prompts.get(default) or "") if default else ""

    def spec(self, role: Role) -> dict[str, Any]:
        """Return everything that changes the meaning of a vector in a role."""
        return {
            **self._identity,
            "prefix": self.prefix(role),
            "compute_dtype": str(self._dtype).removeprefix("torch."),
        }

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:
        """Tokenise a window of texts with the model's prefix and limit."""
        if role not in self._constants:
            self._constants[role] = self._constants_of(texts, role)
        if self._constants[role] is not None:
            return self._tokenize(texts, role)
        none = np.zeros(len(texts), bool)
        return TokenizedTexts(texts, self._count_tokens(texts, role), none, np.zeros(1, np.int64), {})

    def _count_tokens(self, texts: Sequence[str], role: Role) -> npt.NDArray[np.uint32]:
        """Return tokens per text by the model's own preparation; a guess where that has no attention mask."""
        counts = np.array([max(1, len(text) // 4) for text in texts], np.uint32)
        for start in range(0, len(texts), 64):
            mask = self._prepare(texts[start : start + 64], role).get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                counts[start : start + 64] = mask.sum(dim=1).numpy()
        return counts

    def _tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:
        prefix, limit = self.prefix(role), self._model.max_seq_length
        prefixed = [prefix + text for text in texts] if prefix else list(texts)
        with self._tokenizing:
            window, _ = tokenize_window(self._model.tokenizer, prefixed, limit)
        return replace(window, texts=texts)

    def _constants_of(self, texts: Sequence[str], role: Role) -> dict[str, Any] | None:
        """Return the features that are no token arrays, or None where batches cannot be cut out of a window.

        They can where that gives exactly the model's own preparation of the window's extreme texts, of odd ones, and of
        one beyond the limit.
        """
        tokenizer: Any = getattr(self._model, "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
            return None
        lengths = self._tokenize(texts, role).n_tokens
        extreme = np.unique([0, len(texts) - 1, int(lengths.argmax()), int(lengths.argmin())])
        checked = [texts[row] for row in extreme] + [*_CHECKED_TEXTS, "word " * ((self._model.max_seq_length or 0) + 1)]
        theirs = self._prepare(checked, role)
        ours = self._cut(self._tokenize(checked, role), np.arange(len(checked)))
        tensors = {name: value for name, value in theirs.items() if isinstance(value, torch.Tensor)}
        constants = {name: value for name, value in theirs.items() if name not in tensors}
        if ours.keys() != tensors.keys() or any(not torch.equal(ours[name], tensors[name]) for name in tensors):
            return None
        simple = all(isinstance(value, str | int | float | bool | None) for value in constants.values())
        return constants if simple else None

    def _prepare(self, texts: Sequence[str], role: Role) -> dict[str, Any]:
        """Return the model's own features of a batch."""
        prefix = self.prefix(role)
        with self._tokenizing:
            features: dict[str, Any] = self._model.preprocess(list(texts), prompt=prefix or None, task=_TASKS[role])
        return features

    def _cut(self, window: TokenizedTexts, rows: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the padded features of some rows of a window."""
        tokenizer = self._model.tokenizer
        padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        return pad_window(window, rows, padding, left=tokenizer.padding_side == "left")

    @torch.inference_mode()
    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return the vectors of some rows of a window, (m, d) float32 on the encoder's device."""
        require_tokens(window, rows)
        constants = self._constants[role]
        if constants is not None:
            features: dict[str, Any] = {**constants, **self._cut(window, rows)}
        else:
            features = self._prepare([window.texts[row] for row in rows], role)
        on_device = {
            name: _move(value, self._device) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        vectors: torch.Tensor = self._model(on_device, task=_TASKS[role])["sentence_embedding"]
        dim = self._model.truncate_dim
        return (vectors if dim is None else vectors[:, :dim]).float()


def _move(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; only a copy from pinned memory leaves the CPU free meanwhile."""
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def _to_float32(_module: Any, _inputs: Any, output: Any) -> Any:
    """Hand float32 from the transformer to pooling, dense layers and normalisation."""
    if isinstance(output, dict):
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                output[name] = value.float()
    return output
