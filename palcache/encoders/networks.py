"""What a transformers model is, found out by trying it: its layers, its width, whether it is causal, what it can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from palcache.errors import InputError

StatesOf = Callable[[Mapping[str, torch.Tensor], int | None], torch.Tensor]
"""From features and a layer (None is the last) to its states, (m, t, d)."""

_PROBE_TOKENS: Final = 6
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
_UNLIMITED: Final = 1_000_000
"""Tokenizers without a limit of their own give a very large number."""


@final
@dataclass(frozen=True, slots=True)
class Probe:
    """What a few forward passes say of a model.

    Attributes:
        width: number of values in a state, d.
        causal: a later token changes no earlier state.
        padding_matters: tokens behind a masked end change the states before it.
    """

    width: int
    causal: bool
    padding_matters: bool


def states_of(network: Any, features: Mapping[str, torch.Tensor], layer: int | None) -> torch.Tensor:
    """Return the states of a layer, (m, t, d); of the last one where `layer` is None.

    The last layer's states are `last_hidden_state`, after the final normalisation and projection where a model has them.
    """
    if layer is None:
        last: torch.Tensor = network(**features, return_dict=True).last_hidden_state
        return last
    states: torch.Tensor = network(**features, return_dict=True, output_hidden_states=True).hidden_states[layer]
    return states


def layer_number(network: Any, layer: int, label: str) -> int | None:
    """Return a layer's number from the embeddings, 0, upward; None is the last one.

    Raises:
        InputError: the model has no such layer.
    """
    if layer == -1:
        return None
    ids = torch.zeros((1, 1), dtype=torch.long, device=network.device)
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = len(network(**features, return_dict=True, output_hidden_states=True).hidden_states)
    if not -count <= layer < count:
        raise InputError(
            f"Got --layer {layer}; the model {label} has the layers 0 (embeddings) to {count - 1}, or {-count} to -1 from "
            "the end."
        )
    number = layer % count
    return None if number == count - 1 else number


def probe_network(states: StatesOf, layer: int | None, *, vocabulary: int, pad: int, longest: int | None) -> Probe:
    """Try a model on a few tokens: its last layer, and the width of the one that is asked for.

    Args:
        states: calls the model.
        layer: whose width is wanted; None is the last one.
        vocabulary: number of token ids.
        pad: the id that fills batches.
        longest: tokens that the model can read.
    """
    count = min(_PROBE_TOKENS, max(2, (longest or 2 * _PROBE_TOKENS) // 2))
    ids = torch.linspace(vocabulary // 3, vocabulary - 1, count).long()[None]
    changed = ids.clone()
    changed[0, -1] = int(ids[0, 0])
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    first = states({"input_ids": ids, "attention_mask": ones}, None).float()
    second = states({"input_ids": changed, "attention_mask": ones}, None).float()
    scale = float(first.abs().max()) or 1.0
    early = float((first[:, :-1] - second[:, :-1]).abs().max())
    short, long = torch.cat([ids, zeros + pad], dim=1), torch.cat([ids, changed], dim=1)
    masks = torch.cat([ones, zeros], dim=1), torch.cat([ones, ones], dim=1)
    beside = states({"input_ids": torch.cat([short, long]), "attention_mask": torch.cat(masks)}, None)
    difference = float((beside[:1, :count].float() - first).abs().max())
    return Probe(
        width=states({"input_ids": ids, "attention_mask": ones}, layer).shape[2],
        causal=early <= 1e-6 * scale,
        padding_matters=not difference <= _TOLERANCE[beside.dtype] * scale,
    )


def longest_input(network: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a model can read, special tokens included; None where nothing limits it."""
    limits = [getattr(network.config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits.append(tokenizer.model_max_length)
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1  # positions begin behind the padding
            limits.append(module.num_embeddings - skipped)
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _UNLIMITED]
    return min(known, default=None)
