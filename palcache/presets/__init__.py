"""The published configurations: encoder, widths, projector, loss and optimizer of each, as TOML files beside this module.

They are those of github RamyaLab/pluralistic-alignment; where it has no configuration with one prototype for an encoder,
that of two prototypes stands with k = 1. The published training weighs the loss of every token, which needs token vectors:
add `--token-weighting cumulative` for it.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, final

from palcache.configs import FitConfig, HeadConfig
from palcache.errors import InputError


@final
@dataclass(frozen=True, slots=True)
class Preset:
    """A published configuration.

    Attributes:
        name: as `--preset` takes it.
        description: one line.
        encoder: id of the foundation model on the hub.
        width: of its vectors, d.
        head: options of `HeadConfig`.
        fit: options of `FitConfig`.
    """

    name: str
    description: str
    encoder: str
    width: int
    head: dict[str, Any]
    fit: dict[str, Any]

    def head_config(self) -> HeadConfig:
        """Return the shape of the head."""
        return HeadConfig.from_mapping(self.head, origin=self.name)

    def fit_config(self) -> FitConfig:
        """Return how it is trained."""
        return FitConfig.from_mapping(self.fit, origin=self.name)


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def load_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        InputError: there is none of this name (the nearest one is named).
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "palcache presets lists them."
        raise InputError(f"There is no preset {name}; {hint}")
    text = (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
    return Preset(name=name, **tomllib.loads(text))
