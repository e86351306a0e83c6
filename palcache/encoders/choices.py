"""Which kind of encoder a model gets, and loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import huggingface_hub

from palcache.configs import EmbedConfig
from palcache.encoders.loading import locate
from palcache.encoders.protocols import Encoder
from palcache.errors import InputError

_MARK: Final = "modules.json"
"""The file by which a sentence-transformers model is known."""
_HIDDEN_ONLY: Final = ("pooling", "layer", "prompt_template", "response_template", "chat_template", "attn", "tokens")


def load_encoder(config: EmbedConfig) -> Encoder:
    """Load a model: sentence-transformers where it has a `modules.json`, else a transformers model's hidden states.

    Raises:
        ModelError: the model cannot be found, reached or loaded.
        InputError: an option does not suit the kind of encoder, the model or the device.
    """
    if choose_kind(config) == "hidden":
        from palcache.encoders.hidden_states import load_hidden_states

        if config.truncate_dim is not None:
            raise InputError(
                f"Got --truncate-dim {config.truncate_dim} for hidden states of {config.model}; it belongs to "
                "sentence-transformers models: leave it out."
            )
        return load_hidden_states(config)
    from palcache.encoders.sentence import load_encoder as load_sentence

    default = EmbedConfig()
    wrong = [name for name in _HIDDEN_ONLY if getattr(config, name) != getattr(default, name)]
    if config.items == "joint":
        wrong.append("items joint")
    if wrong:
        options = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise InputError(
            f"The model {config.model} is a sentence-transformers model, which has no {options}; add --encoder hidden to "
            "use the hidden states of its transformer."
        )
    return load_sentence(config)


def choose_kind(config: EmbedConfig) -> Literal["sentence", "hidden"]:
    """Return which kind of encoder a configuration means."""
    if config.encoder != "auto":
        return config.encoder
    place, _ = locate(config.model)
    if Path(place).is_dir():
        return "sentence" if (Path(place) / _MARK).is_file() else "hidden"
    return "sentence" if _hub_has_modules(place, config.revision) else "hidden"


def _hub_has_modules(name: str, revision: str | None) -> bool:
    """Return whether a model of the hub is a sentence-transformers model; the local cache is asked first."""
    if isinstance(huggingface_hub.try_to_load_from_cache(name, _MARK, revision=revision), str):
        return True
    try:
        return bool(huggingface_hub.file_exists(name, _MARK, revision=revision))
    except Exception:  # no network, no such model: whoever loads it says what is wrong
        return not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str)
