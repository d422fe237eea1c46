"""What the steps of a recipe need of a node, a GPU and the disk, from the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cache.paths import newest
from pipeline.recipe.resolve import own_caches
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.models import planned_model, vision_of
from pipeline.results.plan.run import Planned
from pipeline.results.plan.samples import Given, describe_samples
from pipeline.results.plan.sharding import optimizer_bytes
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
    """Of all steps together: the cache, checkpoints, the student."""
    memory: tuple[int, str]
    """Of a node."""
    shared_memory: tuple[int, str]
    """Of a node."""
    device: tuple[int, str]
    """Of a GPU."""


def needs(recipe: Recipe, steps: Sequence[str], gpus: int, gpus_per_node: int) -> Needs:
    """Raises RecipeError where the data, the tokenizer or a model's config.json is missing."""
    vision = vision_of(planned_model("student", recipe.student))
    samples = describe_samples(recipe, Given(), vision.patches_per_token, vision.patch_numbers, MEASURED)
    planned = Planned(recipe, samples)
    machine = Machine(gpus, ANY_MEMORY, gpus_per_node)
    plans = {step: planned.plan(step, machine) for step in steps if step in planned.steps}
    return Needs(
        disk=sum(_disk(recipe, planned, step) for step in plans if not done(recipe.run / step)),
        memory=_most({step: plan.host.total for step, plan in plans.items()}),
        # Half of a batch's bytes are its pinned copy, which is no shared memory.
        shared_memory=_most({step: plan.host.batches * 2 // 3 for step, plan in plans.items()}),
        device=_most({step: plan.memory.total for step, plan in plans.items()}),
    )


def _most(sizes: dict[str, int]) -> tuple[int, str]:
    return max(((int(size), step) for step, size in sizes.items()), default=(0, ""))


def _disk(recipe: Recipe, planned: Planned, step: str) -> int:
    """Bytes that a step has still to write: the rest of the cache; or its checkpoints, one more while it is written."""
    if step == "cache":
        if recipe.cache.folder is not None:  # not on the run's disk; the cache job looks at that one
            return 0
        begun = newest(own_caches(recipe))
        return max(0, int(planned.cache().bytes) - (size_of(begun) if begun else 0))
    parameters = planned.parameters(step)[1]
    width = 2 if recipe.precision == "bf16" else 4
    trained = sum(parameter.elements for parameter in parameters if parameter.trained)
    checkpoint = optimizer_bytes(parameters, planned.zero(step), 1, width) + width * trained
    student = width * planned.student.elements() if step == "reinforce" else 0
    return checkpoint * (getattr(recipe, step).keep_checkpoints + 1) + student
