"""Which head is meant by a name, and its shape as JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, get_args

from palcache.choices import LINEAR_HEADS, HeadKind
from palcache.configs import HeadConfig
from palcache.errors import CacheError
from palcache.heads.baselines import BradleyTerry, LowRank
from palcache.heads.pal_a import PalA
from palcache.heads.pal_b import PalB
from palcache.heads.protocols import Head
from palcache.heads.solved import PerUser, PrincipalDirections

AnyHead = PalA | PalB | BradleyTerry | LowRank | PrincipalDirections | PerUser
_KINDS: Final[Mapping[HeadKind, type[AnyHead]]] = {
    "pal-b": PalB,
    "pal-a": PalA,
    "bradley-terry": BradleyTerry,
    "low-rank": LowRank,
    "pca": PrincipalDirections,
    "per-user": PerUser,
}
assert set(_KINDS) == set(get_args(HeadKind))  # noqa: S101 - an invariant of this module


def build_head(config: HeadConfig, *, d: int, users: int) -> AnyHead:
    """Return the shape of the head that a configuration asks for.

    Args:
        config: kind and options.
        d: width of the encoder's vectors.
        users: number of users.

    Raises:
        InputError: the projector does not fit the widths.
    """
    return _KINDS[config.head].from_config(config, d=d, users=users)


def blind_config(config: HeadConfig) -> HeadConfig:
    """Return the user-blind yardstick beside a head: itself with k = 1, or for a yardstick the linear Bradley-Terry."""
    if config.head in LINEAR_HEADS:
        return HeadConfig(head="bradley-terry", projector="identity", k=1)
    return replace(config, k=1)


def head_to_dict(head: Head) -> dict[str, Any]:
    """Return a shape as JSON values under its kind; fields at their defaults are left out."""
    kind = next(kind for kind, cls in _KINDS.items() if isinstance(head, cls))
    values = {
        field.name: getattr(head, field.name)
        for field in dataclasses.fields(head)  # type: ignore[arg-type]
        if getattr(head, field.name) != field.default
    }
    return {"head": kind, **values}


def head_from_dict(values: Mapping[str, Any]) -> AnyHead:
    """Return the shape that `head_to_dict` described.

    Raises:
        CacheError: the kind is unknown, or a field is.
    """
    kind: Any = values.get("head")
    if kind not in _KINDS:
        raise CacheError(
            f"The head is of kind {kind!r}; this version of palcache knows {', '.join(_KINDS)}: use the version that "
            "trained it."
        )
    try:
        return _KINDS[kind](**{name: value for name, value in values.items() if name != "head"})
    except TypeError as error:
        raise CacheError(f"The head of kind {kind} has a shape that this version does not know ({error}).") from error
