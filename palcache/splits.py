"""Train, validation and test: seeded, stable as a table grows, and without a pair on two sides."""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt

from palcache.comparisons import SPLITS, Column, Comparisons
from palcache.configs import SplitBy, SplitConfig
from palcache.errors import InputError
from palcache.fingerprints import Keys, UInt64, text_keys, well_mixed


def split_comparisons(comparisons: Comparisons, config: SplitConfig) -> Comparisons:
    """Return the comparisons with a split column, every unit of `config.by` wholly in one split.

    `auto` takes the table's own split column where it has one, and splits by pair elsewhere. A pair is a prompt with
    its two responses in either order; where the table names pairs (`pair_id`), rows of one name also stay together. A
    row is one user's comparison of a pair, so its repetitions stay together as well. The draw is a seeded hash of the
    unit's content, so a unit keeps its split when the table grows or is reordered; only new rows that give a named
    pair other texts, or other names to a pair, may move that unit.

    Raises:
        InputError: `column` was asked and there is none, or a split with a share above 0 is left empty.
    """
    by = config.by
    if by == "auto":
        by = "column" if comparisons.split is not None else "pair"
    if by == "column":
        if comparisons.split is None:
            raise InputError(
                "--split-by column was asked, but the table has no column split; add one or split by pair."
            )
        return comparisons
    unit = _units(comparisons, by, config.seed)
    uniform = (unit >> np.uint64(11)).astype(np.float64) / 2.0**53
    codes = np.where(uniform < config.test, 2, np.where(uniform < config.test + config.val, 1, 0))
    _refuse_empty(codes, unit, config, by)
    return comparisons.with_split(Column(Column.of(SPLITS).values, codes.astype(np.int32)))


def _refuse_empty(codes: npt.NDArray[np.int64], unit: UInt64, config: SplitConfig, by: str) -> None:
    wanted = {0: 1.0 - config.val - config.test, 1: config.val, 2: config.test}
    for code, share in wanted.items():
        if share > 0 and not np.any(codes == code):
            raise InputError(
                f"The split {SPLITS[code]} is left empty: {len(codes)} comparisons make {len(np.unique(unit))} distinct "
                f"units by {by}, and none of them fell into a share of {share:.2f}; split by something finer, raise the "
                "share, or give more data."
            )


def _units(comparisons: Comparisons, by: str, seed: int) -> UInt64:
    """Return one well-mixed number per row that is equal for rows of one unit, shape (n,)."""
    user = well_mixed(_fold(text_keys(comparisons.users.values), seed))[comparisons.users.codes]
    if by == "user":
        return user
    prompt = _fold(text_keys(comparisons.prompts.values), seed)[comparisons.prompts.codes]
    if by == "prompt":
        return well_mixed(prompt)
    response = well_mixed(_fold(text_keys(comparisons.responses), seed))
    left, right = response[comparisons.response_1], response[comparisons.response_2]
    pair = well_mixed(prompt + well_mixed(left + right) + (left ^ right))
    if by == "pair":
        return pair if comparisons.pair_id is None else _merge(pair, comparisons.pair_id.codes)
    if by == "row":
        return well_mixed(pair + user)
    raise InputError(f"Got --split-by {by}; expected one of {', '.join(get_args(SplitBy))}.")


def _merge(pair: UInt64, name: npt.NDArray[np.int32]) -> UInt64:
    """Return one number per connected set of rows that share a pair or a pair's name."""
    _, code = np.unique(pair, return_inverse=True)
    unit = pair
    while True:
        lowest = unit
        for labels in (code, name):
            least = np.full(int(labels.max()) + 1, np.iinfo(np.uint64).max, np.uint64)
            np.minimum.at(least, labels, lowest)
            lowest = least[labels]
        if np.array_equal(lowest, unit):
            return well_mixed(unit)
        unit = lowest


def _fold(keys: Keys, seed: int) -> UInt64:
    """Fold 16-byte keys and the seed to 64 bits."""
    halves = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    return well_mixed(halves[:, 0] + well_mixed(halves[:, 1] + np.uint64(seed % 2**64)))
