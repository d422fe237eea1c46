"""Updates, bytes moved and hours of each step, and the time to ask SLURM for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.recipe.checks import number_of_steps
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.cuts import Cuts, cache_cuts, training_cuts
from pipeline.results.plan.machine import INSIDE, Machine
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.traffic import Traffic
from pipeline.runtime.data.loader import WINDOW

RESERVE = 1.25
"""SLURM is asked for this much more than the plan says, and for whole hours: the plan knows no file system."""


@dataclass(frozen=True)
class StepTime:
    """How long a step takes."""

    updates: int
    """Of the optimizer; for the cache: batches of a GPU."""
    epochs: float
    micro_steps: float
    """Of an update on one GPU."""
    real_share: float
    """Tokens of the samples over those that GPUs compute or wait for."""
    operations: float
    """Floating-point operations of the whole step on all GPUs, on the samples' own tokens."""
    received: float
    """Bytes that a GPU receives from all others in an update."""
    computing: float
    """Seconds of the whole step that computing takes at the stated utilisation, padding and waiting for the slowest GPU
    included, or as measured."""
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
    cuts = training_cuts(training, machine.gpus, samples.lengths)
    return _time(step, samples, machine, operations, updates, cuts, updates * training.batch_size, moved)


def cache_time(recipe: Recipe, samples: Samples, machine: Machine, operations: float, moved: Traffic) -> StepTime:
    """Of the teacher's one pass over the data. Batches form inside windows of a shard, and a GPU has whole shards."""
    shard = math.ceil(samples.count / samples.shards)
    cuts = cache_cuts(recipe.cache.batch_tokens, min(WINDOW, shard), machine.gpus, samples.lengths)
    most = math.ceil(samples.shards / machine.gpus)
    batches = math.ceil(most * math.ceil(shard / WINDOW) * cuts.micro_steps)
    shared = Cuts(cuts.real_share * samples.shards / (most * machine.gpus), 1)  # with fewer shards a GPU waits
    return _time("cache", samples, machine, operations, batches, shared, samples.count, moved)


def _time(
    step: str,
    samples: Samples,
    machine: Machine,
    each: float,
    updates: int,
    cuts: Cuts,
    seen: int,
    moved: Traffic,
) -> StepTime:
    measured = machine.measured.get(step)
    operations, received = each * seen, moved.update(cuts.micro_steps)
    if measured is not None:
        computing = seen * samples.response / (measured * machine.gpus)
    else:
        computing = operations / cuts.real_share / (machine.gpus * machine.tflops * 1e12 * machine.utilisation)
    return StepTime(
        updates=updates,
        epochs=seen / samples.count,
        micro_steps=cuts.micro_steps,
        real_share=cuts.real_share,
        operations=operations,
        received=received,
        computing=computing,
        moving=updates * (received / machine.link + cuts.micro_steps * moved.inside / INSIDE),
        measured=measured is not None,
    )
