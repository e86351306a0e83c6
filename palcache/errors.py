"""Every error that palcache raises on purpose.

A message is one sentence: what was got, what was expected, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class PalcacheError(Exception):
    """Base of all errors that palcache raises on purpose."""


class InputError(PalcacheError):
    """The user's tables, options or paths are not what was expected."""


class ModelError(InputError):
    """An encoder cannot be found, reached or used as asked."""


class MismatchError(InputError):
    """Two things that belong together do not: a run and a cache, a table and a head."""


class CacheError(PalcacheError):
    """A cache on disk is of another format, damaged, or claimed by someone else."""


class NumericsError(PalcacheError):
    """A vector or a loss is not finite, or does not fit its stored type."""


class StorageError(PalcacheError):
    """The disk is full, read-only or failing."""


class PalcacheWarning(UserWarning):
    """Something was left out or looks wrong, and the work goes on."""


def did_you_mean(name: str, known: Sequence[str], otherwise: str) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or else another sentence."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.61)
    return f"did you mean {near[0]}?" if near else otherwise
