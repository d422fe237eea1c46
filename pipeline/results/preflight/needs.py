"""What the steps of a recipe need of a node, a GPU and the disk, from the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.storage import listed
from pipeline.cache.paths import newest
from pipeline.recipe.resolve import own_caches
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.models import planned_model, vision_of
from pipeline.results.plan.run import Planned, StepPlan
from pipeline.results.plan.samples import Given, describe_samples, own_samples
from pipeline.results.status import size_of
from pipeline.runtime.folder import done

ANY_MEMORY = 1.0
"""GiB of a GPU: what a step needs does not depend on what there is."""

MEASURED = 32
"""Samples whose lengths are taken for all: an image takes up to 0.2 s, and ranks wait."""


@dataclass(frozen=True)
class Needs:
    """The most that any of the steps needs, in bytes, and which step it is."""

    disk: int
    """Of all steps together, beyond what they have written: the cache, checkpoints, the student."""
    memory: tuple[int, str]
    """Of a node."""
    shared_memory: tuple[int, str]
    """Of a node."""
    device: tuple[int, str]
    """Of a GPU."""


def needs(recipe: Recipe, steps: Sequence[str], gpus: int, gpus_per_node: int) -> Needs:
    """Raises RecipeError where the data, the tokenizer or a model's config.json is missing."""
    vision = vision_of(planned_model("student", recipe.student))
    patches = vision.patches_per_token, vision.patch_numbers
    samples = describe_samples(recipe, Given(), *patches, MEASURED)
    own = own_samples(recipe, *patches, MEASURED, steps)
    planned = Planned(recipe, samples, own=own)
    machine = Machine(gpus, ANY_MEMORY, gpus_per_node)
    plans = {step: planned.plan(step, machine) for step in steps if step in planned.steps}
    return Needs(
        disk=_disk(recipe, [plan for step, plan in plans.items() if not done(recipe.run / step)]),
        memory=_most({step: plan.host.needed for step, plan in plans.items()}),
        # Half of a batch's bytes are its pinned copy, which is no shared memory.
        shared_memory=_most({step: plan.host.batches * 2 // 3 for step, plan in plans.items()}),
        device=_most({step: plan.memory.total for step, plan in plans.items()}),
    )


def _most(sizes: dict[str, int]) -> tuple[int, str]:
    return max(((int(size), step) for step, size in sizes.items()), default=(0, ""))


def _disk(recipe: Recipe, plans: Sequence[StepPlan]) -> int:
    """Bytes that steps have still to write in the run's folder: results stay, a step's checkpoints go at its end.

    So the steps' checkpoints take one room, one after the other, and those that stand (of a run that was stopped) have
    it already.
    """
    stand = sum(sum(listed(recipe.run / plan.name / "checkpoints", "update_*/*").values()) for plan in plans)
    checkpoints = max((plan.disk.checkpoints for plan in plans), default=0)
    return max(0, checkpoints - stand) + sum(_result(recipe, plan) for plan in plans)


def _result(recipe: Recipe, plan: StepPlan) -> int:
    """Bytes of what a step leaves in the run's folder: of the cache those that are missing."""
    if plan.name != "cache":
        return plan.disk.result
    if recipe.cache.folder is not None:  # not on the run's disk; the cache job looks at that one
        return 0
    begun = newest(own_caches(recipe))
    return max(0, plan.disk.result - (size_of(begun) if begun else 0))
