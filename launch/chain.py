"""The jobs of a run's chain, each after the one before: which are needed, on what machines, for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.storage import is_file
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import own_caches
from pipeline.recipe.schema import Recipe
from pipeline.results.status import evaluated, planned
from pipeline.runtime.folder import done

NAMES = ("data", "stage1", "cache", "stage2", "evaluate")
"""In order of running."""
STEPS_OF = {"stage1": ("verbalize",), "cache": ("cache",), "stage2": ("interact", "reinforce")}
SCRIPTS = {
    "data": "data_prep.sbatch",
    "stage1": "stage1.sbatch",
    "cache": "cache_array.sbatch",
    "stage2": "stage2.sbatch",
    "evaluate": "evaluate.sbatch",
}


@dataclass(frozen=True)
class Machines:
    """What the user asks for."""

    nodes: int
    """Of stage 1 and stage 2; the cache's array has as many tasks of one node unless cache_jobs says otherwise."""
    gpus: int
    """GPUs, and so ranks, of a node."""
    cpus: int
    """Cores of a rank."""
    cache_jobs: int
    data_ranks: int


@dataclass(frozen=True)
class ChainJob:
    """One job to submit."""

    name: str
    nodes: int
    ranks: int
    """Of a node."""
    gpus: int
    """Of a node."""
    cpus: int
    """Of a rank."""
    tasks: int = 0
    """Of the array; 0: no array."""

    @property
    def machines(self) -> str:
        """For people."""
        array = f"{self.tasks} x " if self.tasks else ""
        of = f"{self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else f"{self.ranks} ranks"
        return f"{array}{self.nodes} node{'s' * (self.nodes != 1)} of {of}"


def chain(recipe: Recipe, machines: Machines, with_data: bool) -> tuple[list[ChainJob], dict[str, str]]:
    """(jobs to submit, in order; {job left out: why}). with_data: whether arguments for data_prep were given.

    Raises RecipeError where the training data neither exists nor is asked for.
    """
    left_out = _left_out(recipe, with_data)
    return [job for job in _all(machines) if job.name not in left_out], left_out


def _all(machines: Machines) -> list[ChainJob]:
    many = (machines.nodes, machines.gpus, machines.gpus, machines.cpus)
    return [
        ChainJob("data", 1, machines.data_ranks, 0, 1),
        ChainJob("stage1", *many),
        ChainJob("cache", 1, machines.gpus, machines.gpus, machines.cpus, machines.cache_jobs),
        ChainJob("stage2", *many),
        ChainJob("evaluate", 1, 1, machines.gpus, machines.gpus * machines.cpus),
    ]


def _left_out(recipe: Recipe, with_data: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    manifest = recipe.data.train / "manifest.json"
    if is_file(manifest):
        found["data"] = f"done: {manifest}"
    elif not with_data:
        raise RecipeError(
            f"data.train: no {manifest}, and no job is asked to make it; add what python -m data_prep shard takes, "
            "behind --: launch.submit ... -- --source llava --input FILE --images DIR --output DIR"
        )
    found |= _stage_1_left_out(recipe)
    student = recipe.run / "student" / "config.json"
    if done(recipe.run / "reinforce") and student.is_file():
        found["stage2"] = f"done: {student.parent}"
    if recipe.data.held_out is None:
        found["evaluate"] = "the recipe has no data.held_out"
    elif "stage2" in found and evaluated(recipe.run):
        found["evaluate"] = f"done: {recipe.run / 'evaluation.json'}"
    return found


def _stage_1_left_out(recipe: Recipe) -> dict[str, str]:
    if recipe.interact.steps == 0:
        return dict.fromkeys(("stage1", "cache"), "not needed: interact.steps is 0")
    left = recipe.left_to_another_run()
    found = {job: f"in {left[step][0]}: {left[step][1]}" for job, (step, *_) in STEPS_OF.items() if step in left}
    if "stage1" not in found and (verbalize := done(recipe.run / "verbalize")):
        found["stage1"] = f"done: {recipe.run / 'verbalize'}"
        if cache := _finished_cache(recipe, verbalize):
            found["cache"] = f"done: {cache}"
    return found


def _finished_cache(recipe: Recipe, verbalize: Mapping[str, Any]) -> Path | None:
    """The cache that was finished last, where it has all shards and interact would take it, or needs it no more."""
    from pipeline.cache.find import may_serve

    finished = done(recipe.run / "cache")
    if finished is None or finished["shards"] != planned(recipe, "cache"):
        return None
    path = own_caches(recipe) / finished["folder"]
    return path if done(recipe.run / "interact") or may_serve(path, recipe, verbalize) else None
