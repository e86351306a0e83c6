"""Sweeps of the published experiments, as TOML files beside this module, in the form of `palcache.sweeps.grids`."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources

from palcache.errors import InputError
from palcache.sweeps.grids import Grid, grid_of


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def load_recipe(name: str) -> Grid:
    """Return the grid of a recipe.

    Raises:
        InputError: there is none of this name (the nearest one is named).
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(names)}."
        raise InputError(f"There is no recipe {name}; {hint}")
    text = (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
    return grid_of(tomllib.loads(text), origin=f"the recipe {name}")
