"""What identifies a space, and in what two of them differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from palcache.cache import Cache
from palcache.configs import EmbedConfig
from palcache.encoders import Encoder, KeptTokens, Role
from palcache.errors import CacheError, PalcacheWarning
from palcache.fingerprints import digest


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


def differing_fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields in which two specs differ, sorted."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def warn_of_other_spec(cache: Cache, name: str, spec: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Warn where the table `name` has been embedded, but by no encoder of this spec, and say which fields differ.

    The texts are then encoded into a space of their own: a tokenizer, weights or options that changed never mix.

    Warns:
        PalcacheWarning: as above; the nearest space is named.
    """
    if name not in cache.comparison_names:
        return
    try:
        stored = cache.comparisons(name)
    except CacheError:  # damaged: it is about to be replaced
        return
    ids = [*stored.joint_spaces, *(space_id for pair in stored.spaces for space_id in pair)]
    specs = {space_id: cache.spec(space_id) for space_id in ids if space_id in cache.space_ids}
    near = {
        space_id: differing_fields(spec, other) for space_id, other in specs.items() if other["role"] == spec["role"]
    }
    if near and digest(spec) not in specs:
        space_id, fields = min(near.items(), key=lambda item: len(item[1]))
        warnings.warn(
            f"The table {name} is embedded in the {spec['role']} space {space_id[:8]} by {cache.about(space_id).get('model')}"
            f"; the encoder {about.get('model')} differs from it in {', '.join(fields)}, so its texts go to another space: "
            "choose between the two with --space.",
            PalcacheWarning,
            stacklevel=5,
        )
