"""Options by name -> a frozen dataclass, from keywords or TOML: unknown names and values of another type are refused."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from palcache.errors import InputError, did_you_mean
from palcache.toml_files import read_toml


class Config:
    """Base of the stage configurations: checked construction from mappings and TOML.

    Abstract: the stages' frozen dataclasses derive from it.
    """

    __slots__ = ()
    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that later versions added; `to_dict` leaves them out at their defaults."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, origin: str = "configuration") -> Self:
        """Build a configuration from names and values.

        Raises:
            InputError: a name is unknown (the nearest one is named), or a value has the wrong type or cannot work; the
                message names `origin`.
        """
        hints = get_type_hints(cls)
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name, value in values.items():
            if name not in known:
                hint = did_you_mean(name, known, f"the keys are {', '.join(known)}.")
                raise InputError(f"{origin}: unknown key {name}; {hint}")
            if not _matches(value, hints[name]):
                raise InputError(f"{origin}: {name} = {value!r}; expected {_describe(hints[name])}.")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{origin}: {error}") from error

    @classmethod
    def from_toml(cls, path: Path, **overrides: Any) -> Self:
        """Build a configuration from a TOML file; overrides that are not None win over the file.

        Raises:
            InputError: the file is missing, is not TOML, or holds an unknown key or a wrong value.
        """
        return cls.from_mapping(read_toml(path) | _given(overrides), origin=str(path))

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build a configuration from options of which None means "the default".

        Raises:
            InputError: a name is unknown, or a value has the wrong type or cannot work.
        """
        return cls.from_mapping(_given(options), origin="options")

    def to_dict(self) -> dict[str, Any]:
        """Return names and values, fit for JSON and TOML.

        Fields that later versions added are left out at their defaults: what an older version trained stays the same.
        """
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if not (field.name in self.later and getattr(self, field.name) == field.default)
        }


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _matches(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in {Union, types.UnionType}:
        return any(_matches(value, member) for member in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(_describe(member) for member in get_args(hint) if member is not types.NoneType)
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(hint, str(hint))


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless the condition holds."""
    if not condition:
        raise InputError(message)


def read_config_file(path: Path, sections: Mapping[str, type[Config]]) -> dict[str, dict[str, Any]]:
    """Return a flat TOML file's keys sorted into the stages that know them.

    Args:
        path: a TOML file whose keys are the fields of several stages, for example `k = 3` and `lr = 1e-3`.
        sections: name of a stage -> its configuration class.

    Raises:
        InputError: the file is missing or is not TOML, a key belongs to none of the stages (the nearest one is named),
            or a value has the wrong type or cannot work.
    """
    out: dict[str, dict[str, Any]] = {name: {} for name in sections}
    fields = {
        field.name: section
        for section, config in sections.items()
        for field in dataclasses.fields(config)  # type: ignore[arg-type]
    }
    for key, value in read_toml(path).items():
        if key not in fields:
            hint = did_you_mean(key, list(fields), f"the keys are {', '.join(fields)}.")
            raise InputError(f"{path}: unknown key {key}; {hint}")
        out[fields[key]][key] = value
    for name, config in sections.items():
        config.from_mapping(out[name], origin=str(path))
    return out
