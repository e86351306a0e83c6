"""Where in a cache the vectors of a table of comparisons are: in which spaces, and in which of their rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from palcache.cache import Cache, Space
from palcache.errors import InputError, MismatchError
from palcache.fingerprints import Keys, hex_key
from palcache.storage.comparison_files import StoredComparisons


def joint_space_of(stored: StoredComparisons, choose: str | None, cache: Cache) -> str:
    """Return the id of the space in which a table's prompts and responses are embedded together.

    Args:
        stored: the table.
        choose: where it is embedded so by several encoders, a prefix of the space's id or the model's name.
        cache: the cache that holds it.

    Raises:
        InputError: nothing or more than one thing fits.
    """
    found = [
        space_id
        for space_id in stored.joint_spaces
        if choose is None or space_id.startswith(choose) or cache.about(space_id).get("model") == choose
    ]
    if len(found) != 1:
        have = "; ".join(f"{cache.about(space_id).get('model')} = {space_id[:8]}" for space_id in stored.joint_spaces)
        raise InputError(
            f"The table {stored.name} is embedded by {len(stored.joint_spaces)} encoders jointly ({have or 'none'}) and "
            f"{'--space ' + choose if choose else 'no --space'} fits {len(found)} of them; choose one with --space, or "
            "embed with --items joint."
        )
    return found[0]


def spaces_of(stored: StoredComparisons, choose: str | None, cache: Cache) -> tuple[str, str]:
    """Return the ids of the prompt and response spaces in which a table is embedded.

    Args:
        stored: the table.
        choose: where it is embedded by several encoders, a prefix of a space's id or the model's name.
        cache: the cache that holds it.

    Raises:
        InputError: nothing or more than one thing fits.
    """
    pairs: Sequence[tuple[str, str]] = stored.spaces
    if not pairs and stored.joint_spaces:
        raise InputError(
            f"The table {stored.name} holds joint items only, and vectors of prompts and responses by themselves are asked "
            "for; run palcache embed on it with --items separate too."
        )
    if choose is not None:
        model = [pair for pair in pairs if cache.about(pair[0]).get("model") == choose]
        pairs = [pair for pair in pairs if any(space_id.startswith(choose) for space_id in pair)] or model
    if len(pairs) != 1:
        have = "; ".join(
            f"{cache.about(prompt).get('model')} = {prompt[:8]} and {response[:8]}"
            for prompt, response in stored.spaces
        )
        raise InputError(
            f"The table {stored.name} is embedded by {len(stored.spaces)} encoders ({have}) and "
            f"{'--space ' + choose if choose else 'no --space'} fits {len(pairs)} of them; choose one with --space."
        )
    return pairs[0]


def find_rows(space: Space, keys: Keys, what: str, name: str, cache: Cache) -> npt.NDArray[np.int64]:
    """Return the rows of keys in a space, (m,).

    Args:
        space: where to look.
        keys: (m, 16).
        what: the items' name in messages.
        name: of the comparison table.
        cache: that holds both.

    Raises:
        MismatchError: a key is not there.
    """
    rows = space.find(keys)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise MismatchError(
            f"{len(missing)} of {len(rows)} {what} of the table {name} have no vector in {cache.path} (the first has the "
            f"key {hex_key(keys[missing[0]])}); run palcache embed on the table again, and see failed.jsonl there."
        )
    return rows
