"""Tables in TOML files: the user's own, and those that lie beside a package's modules under their names."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from palcache.errors import InputError, did_you_mean


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file.

    Raises:
        InputError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The configuration {path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}.") from error


def packaged_names(package: str) -> list[str]:
    """Return the names of the TOML files beside a package's modules, sorted."""
    files = (entry.name for entry in resources.files(package).iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def read_packaged(package: str, name: str, kind: str, *, otherwise: str) -> dict[str, Any]:
    """Return the table in a TOML file beside a package's modules.

    Args:
        package: its dotted name.
        name: of the file, without the ending.
        kind: what such a file is, for messages.
        otherwise: what the message says where no name is near.

    Raises:
        InputError: there is none of this name (the nearest one is named).
    """
    names = packaged_names(package)
    if name not in names:
        raise InputError(f"There is no {kind} {name}; {did_you_mean(name, names, otherwise)}")
    return tomllib.loads((resources.files(package) / f"{name}.toml").read_text(encoding="utf-8"))
