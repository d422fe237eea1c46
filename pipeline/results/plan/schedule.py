"""Updates, bytes moved and hours of each step, and the time to ask SLURM for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.recipe.checks import number_of_steps
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.machine import INSIDE, Machine
from pipeline.results.plan.micro_batches import micro_steps
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.traffic import Traffic

RESERVE = 1.25
"""SLURM is asked for this much more than the plan says, and for whole hours: the plan knows no file system."""


@dataclass(frozen=True)
class StepTime:
    """How long a step takes."""

    updates: int
    """Of the optimizer; for the cache: batches of a GPU."""
    epochs: float
    micro_steps: int
    """Of an update on one GPU."""
    operations: float
    """Floating-point operations of the whole step on all GPUs."""
    received: float
    """Bytes that a GPU receives from all others in an update."""
    computing: float
    """Seconds of the whole step that computing takes at the stated utilisation, or as measured."""
    moving: float
    """Seconds that the bytes take on the slowest link, if nothing else ran."""
    measured: bool
    """Whether `computing` comes from a measured speed; that has waiting in it already."""

    @property
    def seconds(self) -> float:
        """Computing and moving run side by side, so the longer of the two."""
        return self.computing if self.measured else max(self.computing, self.moving)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return "measured" if self.measured else "compute" if self.computing >= self.moving else "network"

    @property
    def slurm_hours(self) -> int:
        """Hours to ask for."""
        return max(1, math.ceil(self.seconds * RESERVE / 3600))


def train_time(
    recipe: Recipe, step: str, samples: Samples, machine: Machine, operations: float, moved: Traffic
) -> StepTime:
    """Of a trained step. operations: of the mean sample."""
    training = getattr(recipe, step)
    updates = number_of_steps(training, samples.count)
    steps = micro_steps(training, machine.gpus, samples.tokens)
    return _time(step, samples, machine, operations, updates, steps, updates * training.batch_size, moved)


def cache_time(recipe: Recipe, samples: Samples, machine: Machine, operations: float, moved: Traffic) -> StepTime:
    """Of the teacher's one pass over the data."""
    batches = math.ceil(samples.count * samples.tokens / recipe.cache.batch_tokens / machine.gpus)
    return _time("cache", samples, machine, operations, batches, 1, samples.count, moved)


def _time(
    step: str,
    samples: Samples,
    machine: Machine,
    each: float,
    updates: int,
    steps: int,
    seen: int,
    moved: Traffic,
) -> StepTime:
    measured = machine.measured.get(step)
    operations, received = each * seen, moved.update(steps)
    if measured is not None:
        computing = seen * samples.response / (measured * machine.gpus)
    else:
        computing = operations / (machine.gpus * machine.tflops * 1e12 * machine.utilisation)
    return StepTime(
        updates=updates,
        epochs=seen / samples.count,
        micro_steps=steps,
        operations=operations,
        received=received,
        computing=computing,
        moving=updates * (received / machine.link + steps * moved.inside / INSIDE),
        measured=measured is not None,
    )
