"""What identifies a space, and in what two of them differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

from palcache.cache import Cache
from palcache.configs import EmbedConfig
from palcache.encoders import Encoder, KeptTokens, Role
from palcache.errors import CacheError, PalcacheWarning
from palcache.fingerprints import digest
from palcache.storage.spaces import differing_fields

CHOSEN_FIELDS: Final = frozenset(
    {"dtype", "compute_dtype", "max_tokens", "truncate_dim", "width", "pooling", "layer", "template", "tokens"}
)
"""Fields of a spec that options choose, or that follow from those."""
__all__ = ["CHOSEN_FIELDS", "config_of", "differing_fields", "full_spec", "kept_tokens", "warn_of_other_spec"]


def full_spec(encoder: Encoder, role: Role, config: EmbedConfig) -> dict[str, Any]:
    """Return the spec of a space: the encoder's, the stored type, the width, and which token states are kept."""
    spec = {**encoder.spec(role), "role": role, "dtype": config.dtype, "width": encoder.width}
    kept = kept_tokens(role, config)
    return spec if kept is None else {**spec, "tokens": kept}


def kept_tokens(role: Role, config: EmbedConfig) -> KeptTokens | None:
    """Return which tokens' states a configuration keeps in a role; None for none."""
    if config.tokens == "none" or (role == "prompt" and config.tokens == "responses"):
        return None
    return config.tokens if role == "joint" else "all"


def config_of(spec: Mapping[str, Any]) -> EmbedConfig:
    """Return a configuration with what `full_spec` adds to an encoder's own spec, for a space's spec."""
    return EmbedConfig(dtype=spec["dtype"], tokens=spec.get("tokens", "none"))


def warn_of_other_spec(cache: Cache, name: str, spec: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Warn where another encoder than this one filled the cache: its model under this name, or that of the table `name`.

    The texts are then encoded into a space of their own: a tokenizer or weights that changed never mix. What an option
    chose, such as the stored type, is no change.

    Warns:
        PalcacheWarning: as above; the fields that differ are named.
    """
    if digest(spec) not in cache.space_ids and not _warn_of_change(cache, spec, about.get("model")):
        _warn_of_table(cache, name, spec, about)


def _warn_of_change(cache: Cache, spec: Mapping[str, Any], model: str | None) -> bool:
    """Say so where the model of a name has changed since the cache was filled; return whether that was said."""
    if model is None:
        return False
    others = [cache.spec(space_id) for space_id in cache.space_ids if cache.about(space_id).get("model") == model]
    fields = [_changed(other, spec) for other in others if other.get("role") == spec["role"]]
    if not fields or not all(fields):
        return False
    nearest = min((len(names), names) for names in fields)[1]
    warnings.warn(
        f"The model {model} is not the one that filled this cache: its {', '.join(nearest)} changed since, "
        f"so its {spec['role']} vectors go into a space of their own and every text is encoded again.",
        PalcacheWarning,
        stacklevel=4,
    )
    return True


def _warn_of_table(cache: Cache, name: str, spec: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Say so where the table `name` has been embedded, but by no encoder like this one."""
    if name not in cache.comparison_names:
        return
    try:
        stored = cache.comparisons(name)
    except CacheError:  # damaged: it is about to be replaced
        return
    ids = [*stored.joint_spaces, *(space_id for pair in stored.spaces for space_id in pair)]
    specs = {space_id: cache.spec(space_id) for space_id in ids if space_id in cache.space_ids}
    near = {space_id: _changed(spec, other) for space_id, other in specs.items() if other["role"] == spec["role"]}
    if near and all(near.values()):
        space_id, fields = min(near.items(), key=lambda item: len(item[1]))
        warnings.warn(
            f"The table {name} is embedded in the {spec['role']} space {space_id[:8]} by {cache.about(space_id).get('model')}"
            f"; the encoder {about.get('model')} differs from it in {', '.join(fields)}, so its texts go to another space: "
            "choose between the two with --space.",
            PalcacheWarning,
            stacklevel=5,
        )


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [name for name in differing_fields(first, second) if name not in CHOSEN_FIELDS]
