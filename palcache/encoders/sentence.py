"""Any sentence-transformers model as an encoder: its own modules, prompts and pooling; our batching.

Texts are tokenised a window at a time and batches are cut out of the window. That this gives what the model's own
`preprocess` gives is checked on the first window; models for which it does not are prepared batch by batch instead.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.configs import EmbedConfig
from palcache.encoders.identities import commit_of, identify, input_modules
from palcache.encoders.loading import (
    BUNDLED,
    MINILM,
    budget_for,
    library_versions,
    locate,
    quiet,
    require_model,
    resolve_compute_dtype,
    why_not,
    workers_for,
)
from palcache.encoders.packed_linears import pack_linears
from palcache.encoders.protocols import Role, TokenizedTexts
from palcache.encoders.windows import pad_window, require_tokens, to_device, tokenize_window
from palcache.errors import InputError, ModelError

__all__ = ["BUNDLED", "MINILM", "SentenceEncoder", "load_encoder", "resolve_compute_dtype"]

PROMPT_NAMES: Final[Mapping[Role, tuple[str, ...]]] = {
    "prompt": ("query",),
    "response": ("document", "passage", "corpus"),
    "joint": (),
}
_TASKS: Final[Mapping[Role, str]] = {"prompt": "query", "response": "document", "joint": "document"}
"""Names under which sentence-transformers models keep their prompts for queries and documents, in its own order."""
_COUNTED: Final = 64
"""Texts prepared at once to count their tokens."""
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
    own = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    require_model(config.model, place, config.revision, cache_dir=own)
    with quiet():
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(
                place,
                device="cpu",
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                local_files_only=Path(place).is_dir(),
                truncate_dim=config.truncate_dim,
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

    Raises:
        InputError: an option does not suit the model.

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
        _require_width(model, config.truncate_dim, label)
        for module in input_modules(model):
            _give_pad_token(getattr(module, "tokenizer", None))
        self._commit = commit_of(getattr(model[0], "auto_model", None), config.revision)
        self._identity = identify(model, config.revision)
        self._constants: dict[Role, dict[str, Any] | None] = {}
        self._tokenizing = threading.Lock()  # a tokenizer keeps its padding and truncation in itself
        model.float()
        for module in input_modules(model):
            module.to(dtype)
            if dtype != torch.float32:
                module.register_forward_hook(_to_float32)
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
        return _width_of(self._model)

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
        tokenizers = (getattr(module, "tokenizer", None) for module in input_modules(self._model))
        return any(getattr(tokenizer, "padding_side", "right") == "left" for tokenizer in tokenizers)

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
        counts, errors = self._count_tokens(texts, role)
        truncated = self._truncated(texts, role, counts)
        return TokenizedTexts(texts, counts, truncated, np.zeros(1, np.int64), {}, errors=errors)

    def _truncated(self, texts: Sequence[str], role: Role, counts: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Return which texts have more tokens than the model's own preparation left of them, where that is known.

        Those with the most tokens alone can be: what limits a model may be an option of its own.
        """
        tokenizer: Any = getattr(self._route(role), "tokenizer", None)
        prefix = self.prefix(role)
        longest = np.flatnonzero(counts == counts.max(initial=0)).tolist()
        found = np.zeros(len(texts), bool)
        with contextlib.suppress(Exception):  # not a tokenizer of transformers
            with self._tokenizing:
                encoded = tokenizer([prefix + texts[row] for row in longest], truncation=False, padding=False)
            found[longest] = [len(ids) > counts[row] for ids, row in zip(encoded["input_ids"], longest, strict=True)]
        return found

    def _count_tokens(self, texts: Sequence[str], role: Role) -> tuple[npt.NDArray[np.uint32], dict[int, str]]:
        """Return tokens per text by the model's own preparation, a guess where that has no attention mask; and failures."""
        counts = np.array([max(1, len(text) // 4) for text in texts], np.uint32)
        errors: dict[int, str] = {}
        parts = [range(start, min(start + _COUNTED, len(texts))) for start in range(0, len(texts), _COUNTED)]
        while parts:
            part = parts.pop()
            try:
                mask = self._prepare(texts[part.start : part.stop], role).get("attention_mask")
            except Exception as error:
                if len(part) > 1:
                    parts += [range(row, row + 1) for row in part]
                else:
                    counts[part.start], errors[part.start] = 0, f"{type(error).__name__}: {error}"
                continue
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                counts[part.start : part.stop] = mask.sum(dim=1).numpy()
        return counts, errors

    def _route(self, role: Role) -> Any:
        """Return the module that reads texts of a role: the first one, or the first of a router's way for the task."""
        routes = getattr(self._model[0], "sub_modules", {})
        return routes[_TASKS[role]][0] if _TASKS[role] in routes else self._model[0]

    def _tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:
        prefix, route = self.prefix(role), self._route(role)
        prefixed = [prefix + text for text in texts] if prefix else list(texts)
        with self._tokenizing:
            window, _ = tokenize_window(route.tokenizer, prefixed, getattr(route, "max_seq_length", None))
        return replace(window, texts=texts)

    def _constants_of(self, texts: Sequence[str], role: Role) -> dict[str, Any] | None:
        """Return the features that are no token arrays, or None where batches cannot be cut out of a window.

        They can where that gives exactly the model's own preparation of the window's extreme texts, of odd ones, and of
        one beyond the limit.
        """
        tokenizer: Any = getattr(self._route(role), "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
            return None
        window = self._tokenize(texts, role)
        sound = np.setdiff1d(np.arange(len(texts)), list(window.errors))
        lengths = window.n_tokens[sound]
        extreme = sound[np.unique([0, -1, lengths.argmax(), lengths.argmin()])] if len(sound) else sound
        checked = [texts[row] for row in extreme] + [*_CHECKED_TEXTS, "word " * ((self._model.max_seq_length or 0) + 1)]
        theirs = self._prepare(checked, role)
        ours = self._cut(self._tokenize(checked, role), np.arange(len(checked)), role)
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

    def _cut(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> dict[str, torch.Tensor]:
        """Return the padded features of some rows of a window."""
        tokenizer = self._route(role).tokenizer
        padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        return pad_window(window, rows, padding, left=tokenizer.padding_side == "left")

    @torch.inference_mode()
    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return the vectors of some rows of a window, (m, d) float32 on the encoder's device."""
        require_tokens(window, rows)
        constants = self._constants[role]
        if constants is not None:
            features: dict[str, Any] = {**constants, **self._cut(window, rows, role)}
        else:
            features = self._prepare([window.texts[row] for row in rows], role)
        on_device = {
            name: to_device(value, self._device) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        vectors: torch.Tensor = self._model(on_device, task=_TASKS[role])["sentence_embedding"]
        dim = self._model.truncate_dim
        return (vectors if dim is None else vectors[:, :dim]).float()


def _require_width(model: Any, truncate_dim: int | None, label: str) -> None:
    """Refuse to keep more values than there are.

    Raises:
        InputError: the model gives fewer.
    """
    before, model.truncate_dim = model.truncate_dim, None
    width = _width_of(model)
    model.truncate_dim = before
    if truncate_dim is not None and truncate_dim > width:
        raise InputError(f"Got truncate_dim = {truncate_dim}; the vectors of {label} have {width} values.")


def _width_of(model: Any) -> int:
    get = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return int(get())


def _give_pad_token(tokenizer: Any) -> None:
    """Let a tokenizer without a pad token fill batches with its end of text, or its first token; the mask hides it."""
    if getattr(tokenizer, "pad_token_id", 0) is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _to_float32(_module: Any, _inputs: Any, output: Any) -> Any:
    """Hand float32 from the transformer to pooling, dense layers and normalisation."""
    if isinstance(output, dict):
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                output[name] = value.float()
    return output
