"""Memory of each node's CPU side: what DeepSpeed offloads, and the batches that wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.recipe.schema import Recipe
from pipeline.results.plan.micro_batches import loader_workers, samples_at_most
from pipeline.results.plan.models import Parameter
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.sharding import Zero, gradient_bytes, optimizer_bytes, shards

PROCESS = 10**9
"""Bytes of a rank's process with torch, transformers and DeepSpeed; its loader processes share most of them."""

AHEAD = 2
"""Batches that each loader process has ready (torch's prefetch_factor)."""

WINDOW = 32
"""Samples whose batches the cache job forms together."""

MB = 2**20


@dataclass(frozen=True)
class HostMemory:
    """Bytes on one node."""

    offloaded: int
    """Weights, optimizer states and gradients that DeepSpeed keeps there, pinned."""
    batches: int
    """Batches of all ranks: of one update, and ahead of it in the loader processes; half of them pinned again."""
    processes: int
    """The ranks' processes, and data.memory_mb of each loader process."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.offloaded + self.batches + self.processes


def host_memory(
    recipe: Recipe, step: str, parameters: Sequence[Parameter], zero: Zero, ranks: int, per_node: int, samples: Samples
) -> HostMemory:
    """per_node: ranks on a node. Batches have the mean sample's size."""
    width = 2 if recipe.precision == "bf16" else 4
    offloaded = 0
    if zero.offload_weights == "cpu":
        offloaded += width * shards(parameters, ranks)
    if zero.offload_optimizer == "cpu":
        offloaded += optimizer_bytes(parameters, zero, ranks, width) + gradient_bytes(parameters, zero, ranks)
    workers = loader_workers(recipe)
    sample = samples.pixel_bytes / 4 * width + samples.tokens * 24
    if step == "cache":
        waiting = WINDOW * (1 + AHEAD * workers)
    else:
        training = getattr(recipe, step)
        waiting = training.batch_size // ranks + AHEAD * workers * samples_at_most(training, samples.longest)
    kept = recipe.data.memory_mb * MB * max(1, workers)
    return HostMemory(
        offloaded=int(offloaded * per_node),
        batches=int(waiting * sample * per_node * 1.5),
        processes=int((PROCESS + kept) * per_node),
    )
