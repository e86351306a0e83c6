"""`palcache presets`: the published configurations."""

from __future__ import annotations

from dataclasses import asdict

from .display import print_json, print_table
from .failures import reports_errors
from .options import JsonOption


@reports_errors
def presets(*, json_: JsonOption = False) -> None:
    """List the published configurations that train-head --preset takes."""
    from palcache.presets import load_preset, preset_names

    found = [load_preset(name) for name in preset_names()]
    if json_:
        print_json({"presets": [asdict(preset) for preset in found]})
        return
    rows = [[p.name, p.encoder, p.head["projector"]] for p in found]
    print_table("presets", ["name", "encoder", "projector"], rows)
