"""The paper's pair for the tests of `plan`: its recipe with the shipped config files, and assumed samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.recipe.resolve import SHIPPED, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.run import Planned
from pipeline.results.plan.samples import Given, Samples, describe_samples

CONFIGS = SHIPPED / "recipes" / "configs"
BY_NUMBER = tuple(
    f"{step}.{field}"
    for step in ("verbalize", "interact", "reinforce")
    for field in ("micro_batch_tokens=null", "micro_batch_size=4")
)
"""Overrides for micro-batches of 4 samples instead of as many as fit into a number of tokens."""


def paper_recipe(*overrides: str) -> Recipe:
    """recipes/qwen2_vl_72b_to_7b.yaml with the config files that are shipped."""
    folders = [f"teacher.path={CONFIGS / 'qwen2_vl_72b'}", f"student.path={CONFIGS / 'qwen2_vl_7b'}"]
    return load_recipe(SHIPPED / "recipes" / "qwen2_vl_72b_to_7b.yaml", [*folders, *overrides]).recipe


def paper_samples(recipe: Recipe, **changes: Any) -> Samples:
    """The paper's 2.9M samples, of assumed lengths."""
    samples = describe_samples(recipe, Given(2_900_000, 900, 150, 650), patches_per_token=4, patch_numbers=1176)
    return replace(samples, **changes)


def paper_plan(*overrides: str) -> Planned:
    """The paper's largest pair."""
    recipe = paper_recipe(*overrides)
    return Planned(recipe, paper_samples(recipe))
