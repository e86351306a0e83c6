"""Heads: small maps from cached vectors and a user to a reward, as pure functions of their parameters."""

from palcache.heads.baselines import BradleyTerry, LowRank
from palcache.heads.kinds import AnyHead, blind_config, build_head, head_from_dict, head_to_dict
from palcache.heads.pal_a import PalA
from palcache.heads.pal_b import PalB
from palcache.heads.projectors import Parameters, Projector
from palcache.heads.protocols import Head, IdealPointHead, SolvedHead, parameter_count
from palcache.heads.scores import scale, unit
from palcache.heads.solved import PerUser, PrincipalDirections

__all__ = [
    "AnyHead",
    "BradleyTerry",
    "Head",
    "IdealPointHead",
    "LowRank",
    "PalA",
    "PalB",
    "Parameters",
    "PerUser",
    "PrincipalDirections",
    "Projector",
    "SolvedHead",
    "blind_config",
    "build_head",
    "head_from_dict",
    "head_to_dict",
    "parameter_count",
    "scale",
    "unit",
]
