"""Which heads a sweep trains: options fixed, crossed, varied together and drawn at random, from a text or a TOML file.

A text is `k=1,2,3 lr=1e-3,3e-4 seed=0:5`: values are separated by commas, `lo:hi` are the whole numbers from lo up to and
without hi, and every combination is one head. A file has the same under `[grid]`, and more:

```toml
preset = "pal-b-tiny-opt350m-k2"   # options of every head, of which those below win

[fixed]                            # one value for all heads
p = 64

[grid]                             # every combination; a text is read as on the command line
k = [1, 2, 3]
seed = "0:5"

[zip]                              # the first values together, the second ones together, ...
lr = [1e-3, 3e-4]
weight_decay = [0.01, 0.1]

[random]                           # drawn `count` times; each draw meets every combination
count = 20
seed = 0
lr_users = { log = [0.01, 1.0] }   # log-uniform; { uniform = [lo, hi] }, { integers = [lo, hi] } or a list to choose from

[new_users]                        # the curve of a table of new users, where one is given
shots = [0, 5, 20]                 # comparisons per user
draws = 5                          # orders of each user's support
```

Keys are the fields of `HeadConfig` and `FitConfig`, and `split_seed`, which splits the table anew.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, Union, final, get_args, get_origin, get_type_hints

import numpy as np

from palcache.configs import FitConfig, HeadConfig, read_toml
from palcache.errors import InputError, did_you_mean
from palcache.presets import load_preset

SPLIT_SEED: Final = "split_seed"
HEAD_KEYS: Final = tuple(option.name for option in fields(HeadConfig))
FIT_KEYS: Final = tuple(option.name for option in fields(FitConfig))
KEYS: Final = (*HEAD_KEYS, *FIT_KEYS, SPLIT_SEED)
NEW_USER_KEYS: Final = ("shots", "draws")
EXAMPLE: Final = "'k=1,2 lr=1e-3,3e-4 seed=0:5'"
_SECTIONS: Final = ("preset", "fixed", "grid", "zip", "random", "new_users")
_RANGE: Final = re.compile(r"(-?\d+):(-?\d+)")
_MEANT_RANGE: Final = re.compile(r"(\d+)(?:-|\.\.|\u2013)(\d+)")
_HINTS: Final[Mapping[str, Any]] = {**get_type_hints(HeadConfig), **get_type_hints(FitConfig), SPLIT_SEED: int}
Params = dict[str, Any]
"""Options of one head by name, as they were asked for."""


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """What a sweep varies.

    Attributes:
        fixed: one value for all heads.
        crossed: values of which every combination is taken.
        zipped: values that vary together.
        drawn: rows of values drawn at random.
        new_users: options of the curve of new users that a recipe asks for.
    """

    fixed: Params = field(default_factory=dict)
    crossed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    zipped: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    drawn: Sequence[Params] = ()
    new_users: Mapping[str, Any] = field(default_factory=dict)

    def heads(self) -> Iterator[Params]:
        """Yield the options of each head, in the order of the axes; the last one varies fastest."""
        together = [dict(zip(self.zipped, row, strict=True)) for row in zip(*self.zipped.values(), strict=True)]
        crossed = [dict(zip(self.crossed, row, strict=True)) for row in itertools.product(*self.crossed.values())]
        for drawn, zipped, row in itertools.product(self.drawn or [{}], together or [{}], crossed):
            yield {**self.fixed, **row, **zipped, **drawn}

    def crossed_with(self, other: Grid) -> Grid:
        """Return this grid with the values of another, which win over this one's."""
        own = {name: values for name, values in self.crossed.items() if name not in other.crossed}
        lost = set(other.crossed)
        for section, names in (("[zip]", set(self.zipped)), ("[random]", {n for row in self.drawn for n in row})):
            for name in sorted(lost & names):
                raise InputError(f"--grid: {name} is in {section} of the file already; leave one of the two out.")
        fixed = {name: value for name, value in self.fixed.items() if name not in lost}
        return replace(self, fixed=fixed, crossed={**own, **other.crossed})


def parse_grid(text: str, *, origin: str = "--grid") -> Grid:
    """Return the grid of a text, for example `k=1,2 seed=0:5`.

    Raises:
        InputError: it is empty, a key is unknown (the nearest is named) or there twice, or a value is not of its type.
    """
    crossed: dict[str, list[Any]] = {}
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{origin}: {text!r} cannot be read ({error}); expected a text like {EXAMPLE}.") from error
    for part in parts:
        name, equals, values = part.partition("=")
        if not (equals and values):
            raise InputError(f"{origin}: got {part!r}; expected name=value,value, for example {EXAMPLE}.")
        _require_key(name, origin)
        if name in crossed:
            raise InputError(f"{origin}: {name} is there twice; give its values in one list: {name}=A,B.")
        crossed[name] = _read_values(name, values, origin)
    if not crossed:
        raise InputError(f"{origin}: the grid is empty; expected options and values such as {EXAMPLE}.")
    return Grid(crossed=crossed)


def read_grid(path: Path) -> Grid:
    """Return the grid of a TOML file.

    Raises:
        InputError: the file cannot be read, has an unknown section or key (the nearest is named) or one twice, values that
            do not fit, or nothing that varies.
    """
    return grid_of(read_toml(path), origin=str(path))


def grid_of(values: Mapping[str, Any], *, origin: str) -> Grid:
    """Return the grid of a TOML file's values; arguments and errors as for `read_grid`."""
    for name in values:
        if name not in _SECTIONS:
            raise InputError(f"{origin}: unknown section {name}; {_hint(name, _SECTIONS)}")
    for name in _SECTIONS[1:]:
        if not isinstance(values.get(name, {}), Mapping):
            raise InputError(f"{origin}: {name} = {values[name]!r}; expected a section [{name}] of options.")
    crossed = {name: _listed(name, value, origin) for name, value in values.get("grid", {}).items()}
    zipped = {name: _listed(name, value, origin) for name, value in values.get("zip", {}).items()}
    if len({len(column) for column in zipped.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in zipped.items())
        raise InputError(f"{origin}: [zip] has lists of different lengths ({lengths}); give as many values of each.")
    drawn = _draw(values.get("random", {}), origin)
    fixed = {name: _listed(name, [value], origin)[0] for name, value in values.get("fixed", {}).items()}
    names = [*fixed, *crossed, *zipped, *(drawn[0] if drawn else ())]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{origin}: {name} is in two sections; leave it in one of them.")
    if not names:
        raise InputError(f"{origin}: the grid is empty; give options and values under [grid], for example k = [1, 2].")
    if "preset" in values:
        preset = load_preset(str(values["preset"]))
        fixed = {**{k: v for k, v in (preset.head | preset.fit).items() if k not in names}, **fixed}
    return Grid(fixed, crossed, zipped, drawn, _new_users(values.get("new_users", {}), origin))


def _new_users(section: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """Return the options of the curve of new users."""

    def counts(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    for name, value in section.items():
        if name not in NEW_USER_KEYS:
            raise InputError(f"{origin}: unknown key {name} in [new_users]; {_hint(name, NEW_USER_KEYS)}")
        if name == "draws" and not counts(value, 1):
            raise InputError(f"{origin}: draws = {value!r} in [new_users]; expected a whole number of at least 1.")
        if name == "shots" and not (isinstance(value, list) and value and all(counts(one, 0) for one in value)):
            raise InputError(
                f"{origin}: shots = {value!r} in [new_users]; expected a list of whole numbers of at least 0."
            )
    return section


def configs_of(params: Mapping[str, Any]) -> tuple[HeadConfig, FitConfig, int | None]:
    """Return the configurations that a head's options stand for, and the seed of its split where it has one.

    Raises:
        InputError: a value cannot work.
    """
    head = HeadConfig.from_mapping({k: v for k, v in params.items() if k in HEAD_KEYS}, origin="head")
    fit = FitConfig.from_mapping({k: v for k, v in params.items() if k in FIT_KEYS}, origin="head")
    seed = params.get(SPLIT_SEED)
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"head: Got {SPLIT_SEED} = {seed}; expected a whole number in [0, 2**32).")
    return head, fit, seed


def _require_key(name: str, origin: str) -> None:
    if name not in KEYS:
        raise InputError(f"{origin}: unknown key {name}; {_hint(name, KEYS)}")


def _hint(name: str, known: Sequence[str]) -> str:
    return did_you_mean(name, known, f"the keys are {', '.join(known)}.")


def _read_values(name: str, text: str, origin: str) -> list[Any]:
    """Return the values in `1,2,5:8`, each once."""
    out: list[Any] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        if found and int in _kinds(name):
            numbers = range(int(found[1]), int(found[2]))
            if not numbers:
                raise InputError(f"{origin}: {name}={part} holds no number; expected lo:hi with lo below hi.")
            out += numbers
        else:
            out.append(_read_value(name, part, origin))
    return list(dict.fromkeys(out))


def _read_value(name: str, text: str, origin: str) -> Any:
    """Return the value that a text stands for in the type of an option."""
    kinds = _kinds(name)
    if type(None) in kinds and text.lower() in {"none", "null"}:
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if text in kinds or str in kinds:
        return text
    meant = _MEANT_RANGE.fullmatch(text) if int in kinds else None
    hint = f"; for a range give {name}={meant[1]}:{int(meant[2]) + 1}, which leaves out its end" if meant else ""
    raise InputError(f"{origin}: {name}={text}; expected {_expected(kinds)}{hint}.")


def _kinds(name: str) -> tuple[Any, ...]:
    """Return the types and the words that an option takes."""

    def members(hint: Any) -> Iterator[Any]:
        if get_origin(hint) in {Union, types.UnionType}:
            for member in get_args(hint):
                yield from members(member)
        elif get_origin(hint) is Literal:
            yield from get_args(hint)
        else:
            yield hint

    return tuple(members(_HINTS[name]))


def _expected(kinds: Sequence[Any]) -> str:
    names = {int: "a whole number", float: "a number", type(None): "none"}
    return " or ".join(str(names.get(kind, kind)) for kind in kinds)


def _listed(name: str, value: Any, origin: str) -> list[Any]:
    """Return the values of an option in a file: a list, or a text as on the command line."""
    _require_key(name, origin)
    if isinstance(value, str) and (_RANGE.search(value) or "," in value):
        return _read_values(name, value, origin)
    found = list(dict.fromkeys(value if isinstance(value, list) else [value]))
    if not found:
        raise InputError(f"{origin}: {name} has no values; give at least one, or leave it out.")
    kinds = _kinds(name)
    for one in found:
        number = isinstance(one, int) and not isinstance(one, bool) and (int in kinds or float in kinds)
        if not (number or one in kinds or type(one) in kinds):
            raise InputError(f"{origin}: {name} = {one!r}; expected {_expected(kinds)}.")
    return [float(one) if float in kinds and int not in kinds and type(one) is int else one for one in found]


def _draw(section: Mapping[str, Any], origin: str) -> list[Params]:
    """Return the rows of a [random] section."""
    options = {name: value for name, value in section.items() if name not in {"count", "seed"}}
    count, seed = section.get("count", 0), section.get("seed", 0)
    if not section:
        return []
    if not (isinstance(count, int) and isinstance(seed, int) and count >= 1 and seed >= 0 and options):
        raise InputError(
            f"{origin}: [random] needs count of at least 1, a seed of at least 0, and options to be drawn."
        )
    for name in options:
        _require_key(name, origin)
    generator = np.random.Generator(np.random.PCG64(seed))
    return [{name: _drawn(name, how, generator, origin) for name, how in options.items()} for _ in range(count)]


def _drawn(name: str, how: Any, generator: np.random.Generator, origin: str) -> Any:
    """Return one value of an option that is drawn at random; floats of four digits, fit for a table."""
    if isinstance(how, list):
        return _listed(name, how, origin)[int(generator.integers(len(how)))]
    pair = next(iter(how.items())) if isinstance(how, dict) and len(how) == 1 else ("", None)
    kind, ends = pair
    low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
    kinds = _kinds(name)
    if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
        if kind == "log" and float in kinds and low > 0:
            return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.4g}")
        if kind == "uniform" and float in kinds:
            return float(f"{generator.uniform(low, high):.4g}")
        if kind == "integers" and int in kinds and isinstance(low, int) and isinstance(high, int):
            return int(generator.integers(low, high))
    raise InputError(
        f"{origin}: {name} = {how!r} in [random]; expected a list to choose from, {{ uniform = [lo, hi] }} or "
        "{ log = [lo, hi] } for numbers, or { integers = [lo, hi] } for whole numbers, with lo below hi."
    )
