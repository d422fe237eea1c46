"""What each step needs on disk: its checkpoints while it trains, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.recipe.schema import Recipe
from pipeline.results.plan.models import Parameter
from pipeline.results.plan.sharding import MASTER_AND_MOMENTS


@dataclass(frozen=True)
class DiskUse:
    """Bytes on the file system of the run's folder."""

    checkpoints: int
    """Of the step at most: those that are kept, and the one that is being written. They go when the step is done."""
    result: int
    """What it leaves: verbalizers, a student, or the teacher cache (on the disk of `cache.folder`, if set)."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.result


def checkpoint_bytes(parameters: Sequence[Parameter]) -> int:
    """One checkpoint, all ranks' files together, without their headers: masters and moments of what trains."""
    return MASTER_AND_MOMENTS * sum(parameter.elements for parameter in parameters if parameter.trained)


def disk_use(recipe: Recipe, step: str, passed: Sequence[Parameter], saved: Sequence[Parameter], cache: int) -> DiskUse:
    """passed: the parameters that the step's backward passes; saved: those that it writes at its end.

    cache: bytes of the complete cache.
    """
    if step == "cache":
        return DiskUse(0, cache)
    width = 2 if recipe.precision == "bf16" else 4
    checkpoints = (getattr(recipe, step).keep_checkpoints + 1) * checkpoint_bytes(passed)
    return DiskUse(checkpoints, width * sum(parameter.elements for parameter in saved))
