"""The published configurations: encoder, widths, projector, loss and optimizer of each, as TOML files beside this module.

They are those of github RamyaLab/pluralistic-alignment; where it has no configuration with one prototype for an encoder,
that of two prototypes stands with k = 1. The published training weighs the loss of every token, which needs token vectors:
add `--token-weighting cumulative` for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from palcache.configs import FitConfig, HeadConfig
from palcache.toml_files import packaged_names, read_packaged


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
    return packaged_names(__name__)


def load_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        InputError: there is none of this name (the nearest one is named).
    """
    return Preset(name=name, **read_packaged(__name__, name, "preset", otherwise="palcache presets lists them."))
