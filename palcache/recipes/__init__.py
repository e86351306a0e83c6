"""Sweeps of the published experiments, as TOML files beside this module, in the form of `palcache.sweeps.grids`."""

from __future__ import annotations

from palcache.sweeps.grids import Grid, grid_of
from palcache.toml_files import packaged_names, read_packaged


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return packaged_names(__name__)


def load_recipe(name: str) -> Grid:
    """Return the grid of a recipe.

    Raises:
        InputError: there is none of this name (the nearest one is named).
    """
    listed = f"the recipes are {', '.join(recipe_names())}."
    return grid_of(read_packaged(__name__, name, "recipe", otherwise=listed), origin=f"the recipe {name}")
