"""The list of the shipped recipes."""

from __future__ import annotations

from pipeline.recipe.shipped import RECIPES, shipped_recipes


def show() -> None:
    """Print each recipe's name, pair and first line, and where they are."""
    shipped = shipped_recipes()
    column = max(len(one.name) for one in shipped)
    for one in shipped:
        print(f"{one.name:<{column}}  {one.pair}\n{'':<{column}}  {one.line}\n")
    print(f"in {RECIPES}\nshow one: python -m pipeline recipes NAME")
