"""What makes two models the same: their content, not their names, places or libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import torch
import xxhash

from palcache.fingerprints import digest

_CONFIG_NOISE: Final = {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_OPTIONS: Final = (
    "pooling_mode",
    "include_prompt",
    "activation_function",
    "processing_kwargs",
    "query_length",
    "document_length",
    "layer_start",
    "stride_sizes",
    "cumulative_term_frequency",
)
"""Options of sentence-transformers modules that change vectors and cannot be read off the weights."""


def identify(model: Any, revision: str | None = None) -> dict[str, Any]:
    """Return what makes two models the same: weights, architecture, tokenizer, modules and limits, not their names.

    Args:
        model: a `SentenceTransformer` as it was loaded.
        revision: of a hub model, as it was asked for.
    """
    tokenizer = getattr(model, "tokenizer", None)
    inputs = input_modules(model)
    architectures = [_architecture_digest(getattr(module, "auto_model", None), revision) for module in inputs]
    tokenizers = [_tokenizer_digest(getattr(module, "tokenizer", None)) for module in inputs]
    return {
        "encoder": "sentence-transformers",
        "weights": _weights_digest(model),
        "architecture": architectures[0] if len(inputs) == 1 else digest(architectures),
        "tokenizer": tokenizers[0] if len(inputs) == 1 else digest(tokenizers),
        "modules": [_describe_module(module) for module in model],
        "max_tokens": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "padding_side": getattr(tokenizer, "padding_side", None),
        "truncation_side": getattr(tokenizer, "truncation_side", None),
    }


def input_modules(model: Any) -> list[Any]:
    """Return the modules of a `SentenceTransformer` that read texts: the first, or the first of each way of a router."""
    routes = getattr(model[0], "sub_modules", None)
    if routes is None:
        return [model[0]]
    return list({id(way[0]): way[0] for way in routes.values()}.values())


def identify_network(network: Any, tokenizer: Any, revision: str | None = None) -> dict[str, Any]:
    """Return what makes two transformers models the same: weights as stored, architecture, class and tokenizer.

    Args:
        network: a `PreTrainedModel` in the type of its checkpoint.
        tokenizer: its tokenizer.
        revision: of a hub model, as it was asked for.
    """
    return {
        "encoder": "hidden-states",
        "weights": _weights_digest(network),
        "architecture": _architecture_digest(network, revision),
        "tokenizer": _tokenizer_digest(tokenizer),
        "modules": [type(network).__name__],
        "truncation_side": tokenizer.truncation_side,
    }


def commit_of(network: Any, revision: str | None = None) -> str | None:
    """Return the commit of a transformers model from the hub, or None for a folder; the network is not asked."""
    config = _config_file(network, revision)
    return None if config is None or config.parent.parent.name != "snapshots" else config.parent.name


def _config_file(network: Any, revision: str | None) -> Path | None:
    """Return the transformer's `config.json` in its folder or in the hub's cache on this machine."""
    name = getattr(getattr(network, "config", None), "name_or_path", None)
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name) / "config.json" if (Path(name) / "config.json").is_file() else None
    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _weights_digest(model: Any) -> str:
    """Return xxh3-128 over the names, shapes, types and bytes of all parameters and buffers as loaded."""
    state = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().cpu().contiguous()
        state.update(f"{name}|{flat.dtype}|{tuple(flat.shape)}|".encode())
        state.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return str(state.hexdigest())


def _architecture_digest(network: Any, revision: str | None) -> str:
    """Return a digest of the transformer's config as its repository has it, without names and library versions."""
    if network is None:
        return digest({})
    path = _config_file(network, revision)
    raw = network.config.to_diff_dict() if path is None else json.loads(path.read_text(encoding="utf-8"))
    return digest({key: value for key, value in raw.items() if key not in _CONFIG_NOISE})


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        return digest({key: value for key, value in state.items() if key not in {"truncation", "padding"}})
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return digest(type(tokenizer).__name__)
    return digest([type(tokenizer).__name__, tokenizer.get_vocab(), str(tokenizer.special_tokens_map)])


def _describe_module(module: Any) -> list[Any]:
    """Return a module's name and the options that are not in the weights."""
    options = {}
    for name in _OPTIONS:
        value = getattr(module, name, None)
        if isinstance(value, torch.nn.Module):
            options[name] = type(value).__name__
        elif value is not None and value != {}:
            options[name] = json.loads(json.dumps(value, default=str))
    described: list[Any] = [type(module).__name__, options]
    routes = getattr(module, "sub_modules", None)
    if routes is not None:  # a router: what it sends where
        ways = {name: [_describe_module(part) for part in way] for name, way in routes.items()}
        mappings = sorted((str(key), str(way)) for key, way in getattr(module, "route_mappings", {}).items())
        described.append([ways, mappings, str(getattr(module, "default_route", None))])
    return described
