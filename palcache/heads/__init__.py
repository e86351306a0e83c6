"""Heads: small maps from cached vectors and a user to a reward, as pure functions of their parameters."""

from palcache.heads.pal_b import PalB, scale
from palcache.heads.projectors import Parameters, Projector

__all__ = ["PalB", "Parameters", "Projector", "scale"]
