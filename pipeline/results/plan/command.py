"""The command: a recipe and the command line's numbers -> a printed plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import STEPS
from pipeline.results.plan import show
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.models import planned_model, vision_of
from pipeline.results.plan.run import Planned
from pipeline.results.plan.samples import Given, describe_samples, own_samples


def run(
    recipe: Path,
    overrides: Sequence[str],
    machine: Machine,
    given: Given,
    bytes_per_token_layer: float | None,
    as_json: bool,
) -> None:
    """Print the plan. Raises RecipeError where a config.json or the lengths of the samples are missing."""
    loaded = load_recipe(recipe, overrides).recipe
    if unknown := sorted(set(machine.measured) - set(STEPS)):
        raise RecipeError(f"--tokens-per-second: expected STEP=N with one of {', '.join(STEPS)}, found {unknown[0]}")
    vision = vision_of(planned_model("student", loaded.student))
    patches = vision.patches_per_token, vision.patch_numbers
    planned = Planned(
        loaded, describe_samples(loaded, given, *patches), bytes_per_token_layer, own_samples(loaded, *patches)
    )
    if as_json:
        print(show.to_json(planned, machine))
    else:
        show.show(planned, machine)
