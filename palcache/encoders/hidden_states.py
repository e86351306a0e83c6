"""Hidden states of any transformers model as vectors: pooled, token by token, and of prompt and response together.

Batches are padded on the right whatever the tokenizer's side, so that no position moves: a token's state is that of its
text alone, for causal models because later tokens are never seen, for the others because the mask hides the padding.
That this holds for the model at hand is tried when it is loaded.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from palcache.configs import EmbedConfig, Pooling
from palcache.encoders.identities import commit_of, identify_network
from palcache.encoders.loading import (
    budget_for,
    library_versions,
    locate,
    quiet,
    require_model,
    resolve_compute_dtype,
    why_not,
    workers_for,
)
from palcache.encoders.networks import layer_number, longest_input, probe_network, states_of
from palcache.encoders.packed_linears import pack_linears
from palcache.encoders.protocols import KeptTokens, Role, States, TokenizedTexts
from palcache.encoders.templates import Templates
from palcache.encoders.windows import pad_window, require_tokens, to_device, tokenize_window
from palcache.errors import InputError, ModelError

_POOLER: Final = "pooler."
"""Weights that no hidden state depends on; checkpoints often lack them and loading then draws them at random."""


def load_hidden_states(config: EmbedConfig) -> HiddenStateEncoder:
    """Load a transformers model and its tokenizer: a folder, or an id on the hub.

    Raises:
        ModelError: the model cannot be found, reached or loaded, or its checkpoint lacks weights.
        InputError: an option does not suit the model or the device.
    """
    from palcache.devices import resolve_device

    device = resolve_device(config.device)
    dtype = resolve_compute_dtype(config.compute_dtype, device)
    place, label = locate(config.model)
    require_model(config.model, place, config.revision)
    options: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": Path(place).is_dir(),
    }
    with quiet():
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            network, info = AutoModel.from_pretrained(
                place, dtype="auto", attn_implementation=config.attn, output_loading_info=True, **options
            )
        except Exception as error:
            if config.attn is not None and ("attn" in str(error) or "attention" in str(error).lower()):
                first = str(error).strip().splitlines()[0][:200]
                raise InputError(f"The model {config.model} cannot use --attn {config.attn} ({first}).") from error
            raise ModelError(why_not(config.model, place, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"The model {config.model} has no tokenizer; copy the files of its tokenizer (tokenizer.json, ...) into the folder."
        )
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith(_POOLER)):
        raise ModelError(
            f"The checkpoint of {config.model} lacks {len(missing)} weights ({missing[0]}, ...), which would be random; "
            "give the whole model."
        )
    return HiddenStateEncoder(network, tokenizer, label=label, device=device, dtype=dtype, config=config)


@final
class HiddenStateEncoder:
    """A transformers model on a device; use `load_hidden_states` unless you have the model at hand.

    Args:
        network: a loaded `PreTrainedModel` without a head; of an encoder-decoder the encoder is used.
        tokenizer: its fast tokenizer.
        label: its name, for the record.
        device: where to compute.
        dtype: type of the forward pass; pooling is float32.
        config: the options for hidden states, and `max_tokens`.

    Raises:
        InputError: an option does not suit the model.
        ModelError: the tokenizer is not a fast one.

    The encoder takes the network over: it changes its type and device, and speeds up its linear layers.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        label: str,
        device: torch.device,
        dtype: torch.dtype,
        config: EmbedConfig | None = None,
    ) -> None:
        config = config or EmbedConfig(encoder="hidden")
        _require_fast(tokenizer, label)
        network = _without_parts(network)
        self._commit = commit_of(network, config.revision)
        self._identity = identify_network(network, tokenizer, config.revision)
        self._network, self._tokenizer = network.eval().to(dtype).to(device), tokenizer
        self._label, self._device, self._dtype, self._config = label, device, dtype, config
        if device.type == "cpu":
            pack_linears(network)
        self._accepts = set(inspect.signature(network.forward).parameters)
        self._pad = _pad_token(tokenizer, network.config)
        self._tokenizing = threading.Lock()  # a tokenizer keeps its padding and truncation in itself
        longest = longest_input(network, tokenizer)
        self.limit = _limit(config, longest, label)
        self.templates = Templates.of(config, tokenizer)
        with torch.inference_mode():
            self._layer = layer_number(network, config.layer, label)
            vocabulary = network.config.get_text_config().vocab_size
            self._probe = probe_network(
                self._states, self._layer, vocabulary=vocabulary, pad=self._pad, longest=longest
            )
        self.pooling = _choose_pooling(config.pooling, causal=self._probe.causal, label=label)

    @property
    def causal(self) -> bool:
        """A token's state depends on the tokens before it alone."""
        return self._probe.causal

    @property
    def about(self) -> Mapping[str, Any]:
        """The model's name, and its commit where it came from the hub."""
        return {"model": self._label, "revision": self._commit}

    @property
    def versions(self) -> Mapping[str, str]:
        """Libraries, device and implementation of attention."""
        attention = getattr(self._network.config, "_attn_implementation", None)
        return {**library_versions(self._device), "attention": str(attention)}

    @property
    def width(self) -> int:
        """Number of values in a vector, d."""
        return self._probe.width

    @property
    def token_budget(self) -> int:
        """Padded tokens per batch that suit the device."""
        return budget_for(self._device)

    @property
    def workers(self) -> int:
        """How many batches go side by side."""
        return workers_for(self._device)

    @property
    def equal_lengths(self) -> bool:
        """Padding was seen to change this model's states, so batches hold texts of one length."""
        return self._probe.padding_matters

    def spec(self, role: Role) -> dict[str, Any]:
        """Return everything that changes the meaning of a vector in a role."""
        spec = {
            **self._identity,
            "pooling": self.pooling,
            "layer": self._layer,
            "template": self.templates.spec(role),
            "max_tokens": self.limit,
            "compute_dtype": str(self._dtype).removeprefix("torch."),
        }
        return {**spec, "prompt_state": self.causal} if role == "joint" else spec

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:
        """Tokenise a window of prompts or of responses."""
        written, broken = self.templates.write_all(texts, role)
        with self._tokenizing:
            window, _ = tokenize_window(
                self._tokenizer, written, self.limit, special_tokens=not self.templates.is_chat(role), broken=broken
            )
        return replace(window, texts=texts)

    def tokenize_pairs(self, prompts: Sequence[str], responses: Sequence[str]) -> TokenizedTexts:
        """Tokenise joint items; a token that reaches from the prompt into the response is the response's.

        Raises:
            InputError: the tokenizer truncates on the left, where the prompt is.
        """
        if self._tokenizer.truncation_side == "left":
            raise InputError(
                f"The tokenizer of {self._label} truncates on the left and would cut prompts off joint items; set "
                "truncation_side to right in its tokenizer_config.json, or embed with --items separate."
            )
        written, ends, broken = self.templates.write_pairs(prompts, responses)
        with self._tokenizing:
            window, encodings = tokenize_window(
                self._tokenizer, written, self.limit, special_tokens=not self.templates.is_chat("joint"), broken=broken
            )
        items = zip(encodings, written, ends, strict=True)
        counts = np.array([_tokens_before(encoding, end, len(text)) for encoding, text, end in items], np.uint32)
        return replace(window, texts=written, prompt_tokens=np.minimum(counts, window.n_tokens))

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return the pooled vectors of some rows of a window, (m, d) float32 on the encoder's device."""
        return self.encode_states(window, rows, role).pooled

    @torch.inference_mode()
    def encode_states(
        self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role, *, kept: KeptTokens | None = None
    ) -> States:
        """Return the pooled vectors of some rows, and the states of the tokens that are kept, from one forward pass."""
        require_tokens(window, rows)
        padding = {"input_ids": self._pad, "token_type_ids": getattr(self._tokenizer, "pad_token_type_id", 0)}
        features = pad_window(window, rows, padding)
        states = self._states(features, self._layer)
        lengths = window.n_tokens[rows].astype(np.int64)
        prompt = tokens = None
        if role == "joint" and self.causal and window.prompt_tokens is not None:
            prompt = _at(states, np.maximum(window.prompt_tokens[rows].astype(np.int64) - 1, 0))
        if kept is not None:
            first, column = window.first_kept(kept)[rows], np.arange(states.shape[1])
            inside = (column >= first[:, None]) & (column < lengths[:, None])
            tokens = _take(states, np.flatnonzero(inside))
        return States(_pool(states, lengths, self.pooling), prompt, tokens)

    def _states(self, features: Mapping[str, torch.Tensor], layer: int | None) -> torch.Tensor:
        """Return the states of a layer, (m, t, d) in the type of the forward pass."""
        known = {name: value for name, value in features.items() if name in self._accepts}
        on_device = {name: to_device(value, self._device) for name, value in known.items()}
        return states_of(self._network, on_device, layer)


def _require_fast(tokenizer: Any, label: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer of {label} is a slow one ({type(tokenizer).__name__}), which does not say which token comes "
            "from which character; give a model with a tokenizer.json."
        )


def _without_parts(network: Any) -> Any:
    """Return the part of a network that makes hidden states: no decoder behind an encoder, no pooler, no cache."""
    if getattr(network.config, "is_encoder_decoder", False):
        network = network.get_encoder()
    if isinstance(getattr(network, "pooler", None), torch.nn.Module):
        network.pooler = None
    network.config.use_cache = False
    return network


def _limit(config: EmbedConfig, longest: int | None, label: str) -> int | None:
    if config.max_tokens is not None and longest is not None and config.max_tokens > longest:
        raise InputError(f"Got max_tokens = {config.max_tokens}; the model {label} reads at most {longest}.")
    return longest if config.max_tokens is None else config.max_tokens


def _pad_token(tokenizer: Any, config: Any) -> int:
    """Return the id that fills batches; the mask hides it, so a model without one gets its end of text, or 0."""
    candidates = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    return int(next((found for found in candidates if found is not None and found >= 0), 0))


def _choose_pooling(pooling: Pooling, *, causal: bool, label: str) -> Pooling:
    if pooling == "auto":
        return "last" if causal else "mean"
    if pooling == "cls" and causal:
        raise InputError(
            f"The model {label} is causal, so the state of its first token is the same for texts that begin alike; use "
            "--pooling last or mean."
        )
    return pooling


def _tokens_before(encoding: Any, end: int, length: int) -> int:
    """Return how many tokens stand before the first that holds a character from `end` on; all where none does."""
    found = (encoding.char_to_token(at) for at in range(end, length))
    first: int = next((token for token in found if token is not None), len(encoding.ids))
    return first


def _take(states: torch.Tensor, places: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return the states at some places of a batch counted through row after row, (m, t, d), (n,) -> (n, d) float32.

    The places are found on the host, where all lengths are known: a mask on the device would have to be waited for.
    """
    return states.flatten(0, 1).index_select(0, to_device(torch.from_numpy(places), states.device)).float()


def _at(states: torch.Tensor, column: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return one state a row, (m, t, d), (m,) -> (m, d) float32."""
    return _take(states, np.arange(len(column)) * states.shape[1] + column)


def _pool(states: torch.Tensor, lengths: npt.NDArray[np.int64], pooling: Pooling) -> torch.Tensor:
    """Return one vector a row, (m, d) float32; padding has no part in it."""
    if pooling == "cls":
        return states[:, 0].float()
    if pooling == "last":
        return _at(states, lengths - 1)
    counts = to_device(torch.from_numpy(lengths), states.device)[:, None]
    inside = torch.arange(states.shape[1], device=states.device) < counts
    return states.float().masked_fill(~inside[:, :, None], 0.0).sum(dim=1) / counts
