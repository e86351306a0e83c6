"""Lints: what makes a result look better than it is, found before it is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from palcache.cache import Cache, Space
from palcache.checkpoints import load_head
from palcache.comparisons import Comparisons, IntArray
from palcache.errors import CacheError
from palcache.fingerprints import digest
from palcache.pairs import Codes, contradictions, distinct_rows, pair_codes
from palcache.runs.folders import read_config
from palcache.runs.trainings import evaluate_run
from palcache.storage.shards import FAILED

EXAMPLES: Final = 3
TEXT: Final = 60
"""Characters of a text that an example shows."""
ADAPTING: Final = frozenset({"support", "query"})
TELL: Final = 0.9
"""A format is a tell where, of the rows in which only one response has it, this share has it on the same side."""
TELL_ROWS: Final = 20
TELL_SHARE: Final = 0.05
"""... and where at least so many rows, and this share of the table, differ in it at all."""
NORM_TOLERANCE: Final = 0.01
NORM_ROWS: Final = 4_096
Mask = npt.NDArray[np.bool_]


@final
@dataclass(frozen=True, slots=True)
class Lint:
    """A warning.

    Attributes:
        code: its name, for example `pair-in-two-splits`.
        where: the table or space.
        message: one sentence: what was found and what to do.
        examples: up to `EXAMPLES` places.
    """

    code: str
    where: str
    message: str
    examples: tuple[str, ...] = ()


def lint_cache(cache: Cache, *, run: Path | None = None) -> tuple[Lint, ...]:
    """Return the warnings about a cache's tables and vectors, and with a run about its results; empty is good.

    Args:
        cache: the cache.
        run: a run folder that was trained on it.
    """
    if run is not None:
        read_config(run)
    tables = {name: cache.comparisons(name).comparisons for name in cache.comparison_names}
    found: list[Lint] = []
    for name, table in tables.items():
        for check in (_split_pairs, _mirrored, _contradicting, _sides):
            found += [replace(lint, where=f"table {name}") for lint in check(table)]
    found += _users_twice(tables, run)
    for space_id in cache.space_ids:
        found += _vectors(cache, space_id)
    return (*found, *(_better_on_test(run, cache) if run is not None else ()))


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else line[: TEXT - 3] + "..."


def _example(table: Comparisons, row: int) -> str:
    user = table.users.values[table.users.codes[row]].as_py()
    prompt = table.prompts.values[table.prompts.codes[row]].as_py()
    sides = [_shorten(table.responses[codes[row]].as_py()) for codes in (table.response_1, table.response_2)]
    split = f", {table.split.values[table.split.codes[row]].as_py()}" if table.split else ""
    return f"row {row + 1} ({user}{split}): {_shorten(prompt)!r}: {sides[0]!r} or {sides[1]!r}"


def _examples(table: Comparisons, rows: Codes) -> tuple[str, ...]:
    return tuple(_example(table, int(row)) for row in rows[:EXAMPLES])


def _split_pairs(table: Comparisons) -> Iterator[Lint]:
    """The same pair, in either order, in two splits: the test was trained on. Support and query count per user."""
    if table.split is None:
        return
    names: list[str] = table.split.values.to_pylist()
    adapting = np.array([name in ADAPTING for name in names], bool)[table.split.codes]
    owner = np.where(adapting, table.users.codes + 1, 0)
    unit = distinct_rows(pair_codes(table), owner, adapting)
    cells = np.unique(np.stack([unit, table.split.codes]), axis=1)
    several = np.bincount(cells[0], minlength=int(unit.max()) + 1) > 1
    rows = np.flatnonzero(several[unit])
    if len(rows):
        rows = rows[np.argsort(unit[rows], kind="stable")]
        yield Lint(
            "pair-in-two-splits", "",
            f"{int(several.sum()):,} pairs ({len(rows):,} comparisons) stand in more than one split, so what is tested was "
            "trained on; embed the table again with --split-by pair.",
            _examples(table, rows),
        )  # fmt: skip


def _mirrored(table: Comparisons) -> Iterator[Lint]:
    """A user who judged one pair in both orders counts twice."""
    asked = distinct_rows(table.users.codes, pair_codes(table))
    first = table.response_1 < table.response_2
    size = int(asked.max(initial=-1)) + 1
    both = (np.bincount(asked[first], minlength=size) > 0) & (np.bincount(asked[~first], minlength=size) > 0)
    rows = np.flatnonzero(both[asked])
    if len(rows):
        rows = rows[np.argsort(asked[rows], kind="stable")]
        yield Lint(
            "mirrored-pairs", "",
            f"{int(both.sum()):,} pairs were judged by the same user in both orders ({len(rows):,} comparisons), so they "
            "count twice; keep one order of each.",
            _examples(table, rows),
        )  # fmt: skip


def _contradicting(table: Comparisons) -> Iterator[Lint]:
    rows = contradictions(table)
    if len(rows):
        users = len(np.unique(table.users.codes[rows]))
        yield Lint(
            "contradictions", "",
            f"{users:,} users preferred both responses of one pair at different times ({len(rows):,} comparisons), which "
            "no reward can predict; look at these rows, and drop them if they are mistakes.",
            _examples(table, rows[np.argsort(pair_codes(table)[rows], kind="stable")]),
        )  # fmt: skip


def _starts(pattern: str) -> Callable[[pa.Array], Mask]:
    return lambda texts: np.asarray(pc.match_substring_regex(texts, rf"^(?:{pattern})").to_numpy(zero_copy_only=False))


def _ends(pattern: str) -> Callable[[pa.Array], Mask]:
    return lambda texts: np.asarray(pc.match_substring_regex(texts, rf"(?:{pattern})$").to_numpy(zero_copy_only=False))


FORMATS: Final[Mapping[str, Callable[[pa.Array], Mask]]] = {
    "an opening quote": _starts("[\"'\u201c\u2018\u00ab`]"),
    "a closing quote": _ends("[\"'\u201d\u2019\u00bb`]"),
    "an opening bracket": _starts(r"[\[({<]"),
    "a closing bracket": _ends(r"[\])}>]"),
    "a space in front": _starts(r"\s"),
    "a space at the end": _ends(r"\s"),
    "a capital in front": _starts(r"\p{Lu}"),
    "a full stop at the end": _ends(r"[.!?]"),
    "a label in front": _starts(r"\w{1,12}:"),
    "a list mark in front": _starts("[-*\u2022]|[0-9]+[.)]"),
}
"""Formats of a response that have nothing to do with what it says."""


def _sides(table: Comparisons) -> Iterator[Lint]:
    """A format, the length or the label that stands on one side: a head can read the answer off the form."""
    left, right, y = table.response_1, table.response_2, table.y
    length = pc.utf8_length(table.responses).to_numpy()
    longer = np.sign(length[right] - length[left])
    yield from _tell(table, "side-tell", "the longer text", longer, "response_2", "response_1")
    differences: list[tuple[str, npt.NDArray[Any]]] = []
    for name, has in FORMATS.items():
        marked = has(table.responses).astype(np.int8)
        differences.append((name, marked[right] - marked[left]))
    opening = _opening_words(table.responses)
    for word in _common(opening, left, right):
        marked = (opening == word).astype(np.int8)
        differences.append((f"the opening word {word!r}", marked[right] - marked[left]))
    for name, difference in differences:
        found = list(_tell(table, "side-tell", name, difference, "response_2", "response_1"))
        yield from found or _tell(
            table, "answer-tell", name, difference * y, "the preferred response", "the rejected response"
        )
    yield from _tell(
        table, "label-on-one-side", "the preferred response", y.astype(np.int64), "response_2", "response_1"
    )


def _opening_words(texts: pa.Array) -> npt.NDArray[Any]:
    found = pc.extract_regex(texts, r"^\s*(?P<word>\S{1,24})")
    return np.array([item["word"] if item else "" for item in found.to_pylist()], dtype=object)


def _common(words: npt.NDArray[Any], left: IntArray, right: IntArray) -> Sequence[str]:
    """Return the words with which one side often begins and the other seldom."""
    names, codes = np.unique(words.astype(str), return_inverse=True)
    sides = [np.bincount(codes[side], minlength=len(names)) for side in (left, right)]
    uneven = np.abs(sides[0] - sides[1]) >= max(TELL_ROWS, 2 * TELL_SHARE * len(left))
    return [str(name) for name in names[uneven]]


def _tell(table: Comparisons, code: str, what: str, difference: npt.NDArray[Any], yes: str, no: str) -> Iterator[Lint]:
    """Warn where `difference` (+1: on `yes` alone, -1: on `no` alone) nearly always has one sign."""
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    side, count = (yes, up) if up >= down else (no, down)
    if up + down < max(TELL_ROWS, TELL_SHARE * len(difference)) or count < TELL * (up + down):
        return
    rows = np.flatnonzero(difference > 0 if up >= down else difference < 0)
    yield Lint(
        code, "",
        f"{what[0].upper() + what[1:]} is on {side} in {count:,} of the {up + down:,} comparisons in which the "
        "two differ in it, so form gives the answer away; clean the texts, and draw the sides by a coin.",
        _examples(table, rows),
    )  # fmt: skip


def _users_twice(tables: Mapping[str, Comparisons], run: Path | None) -> Iterator[Lint]:
    """Users who are both seen (train) and new (support, query)."""
    seen: dict[str, str] = {}
    new: dict[str, str] = {}
    for name, table in tables.items():
        if table.split is None:
            continue
        splits: list[str] = table.split.values.to_pylist()
        for role, users in (("train", seen), ("support", new), ("query", new)):
            if role in splits:
                rows = np.flatnonzero(table.split.codes == splits.index(role))
                users.update(dict.fromkeys(table.users.take(rows).values.to_pylist(), name))
    if run is not None:
        seen |= dict.fromkeys(load_head(run / "head.safetensors").users, f"the run {run}")
    both = sorted(seen.keys() & new.keys())
    if both:
        yield Lint(
            "seen-and-new", "tables",
            f"{len(both):,} users are both seen and new, so their results as new users are those of users the head was "
            "trained on; leave them out of one of the two.",
            tuple(f"{user!r}: seen in {seen[user]}, new in {new[user]}" for user in both[:EXAMPLES]),
        )  # fmt: skip


def _vectors(cache: Cache, space_id: str) -> Iterator[Lint]:
    """Vectors that are not what the manifest says."""
    where = f"space {space_id[:8]} ({cache.about(space_id).get('model')})"
    try:
        space = cache.space(space_id)
    except CacheError as error:
        yield Lint("vectors", where, str(error))
        return
    problems: list[tuple[str, tuple[str, ...]]] = []
    if digest(space.spec) != space_id:
        problems.append(("the manifest's spec has been changed: it no longer gives the space's id", ()))
    for shard in space.shards:
        if shard.vectors.shape[1:] != (space.width,):
            problems.append((f"{shard.path.name} has vectors of width {shard.vectors.shape[1]}, not {space.width}", ()))
    if not problems and len(space):
        problems += _numbers(space)
    for problem, examples in problems:
        message = f"The vectors are not what the manifest says: {problem}; run palcache cache verify, and embed again."
        yield Lint("vectors", where, message, examples)


def _numbers(space: Space) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what is wrong with the values of an even sample of a space's usable rows."""
    failed = np.concatenate([(shard.flags & FAILED) != 0 for shard in space.shards])
    usable = np.flatnonzero(~failed)
    rows = (
        usable[np.linspace(0, len(usable) - 1, min(NORM_ROWS, len(usable))).astype(np.int64)] if len(usable) else usable
    )
    norms = space.rows(rows).float().norm(dim=1).numpy()
    told = space.norms()[rows]
    bad = rows[~np.isfinite(norms)]
    if len(bad):
        yield f"{len(bad):,} of {len(rows):,} rows are not finite", tuple(f"row {row}" for row in bad[:EXAMPLES])
    zero = rows[norms == 0]
    if len(zero):
        yield f"{len(zero):,} of {len(rows):,} rows are zero", tuple(f"row {row}" for row in zero[:EXAMPLES])
    off = np.abs(norms - told) > NORM_TOLERANCE * np.maximum(told, 1e-6)
    off &= np.isfinite(norms) & (norms > 0)
    if off.any():
        yield (
            f"{int(off.sum()):,} of {len(rows):,} rows have another norm than was recorded",
            tuple(f"row {rows[i]}: {norms[i]:.4f}, recorded {told[i]:.4f}" for i in np.flatnonzero(off)[:EXAMPLES]),
        )


def _better_on_test(run: Path, cache: Cache) -> Iterator[Lint]:
    """A head that is better on test than on train by more than chance has seen the test, or was tested on easy rows."""
    train, test = (
        evaluate_run(run, cache, split=split, unknown_users="drop")["head"].accuracy["micro"]
        for split in ("train", "test")
    )
    if test.low > train.high:
        yield Lint(
            "test-better-than-train", f"run {run}",
            f"The head scores {test.value:.4f} on test ({test.low:.3f} to {test.high:.3f}) and {train.value:.4f} on train "
            f"({train.low:.3f} to {train.high:.3f}), so the splits are not of one kind; look for leaks, and split anew.",
        )  # fmt: skip
