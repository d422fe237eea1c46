"""Memory of each node's CPU side: what DeepSpeed offloads, the batches that wait, and a checkpoint's copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.recipe.schema import Recipe, Training
from pipeline.results.plan.cuts import training_cuts
from pipeline.results.plan.disk import checkpoint_bytes
from pipeline.results.plan.micro_batches import loader_workers
from pipeline.results.plan.models import Parameter
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.sharding import MASTER_AND_MOMENTS, Zero, gradient_bytes, optimizer_bytes, shards
from pipeline.runtime.data.loader import WAITING_BYTES, WINDOW, batches_ahead, workers_within

PROCESS = 10**9
"""Bytes of a rank's process with torch, transformers and DeepSpeed; its loader processes share most of them."""

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
    checkpoint: int
    """The copy from which a checkpoint is written while training goes on. Where that is more than half of the free
    memory, the step waits for its checkpoints instead."""

    @property
    def needed(self) -> int:
        """Without which the step does not run."""
        return self.offloaded + self.batches + self.processes

    @property
    def total(self) -> int:
        """All of it."""
        return self.needed + self.checkpoint


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
    workers = loader_workers(recipe, step)
    sample = samples.pixel_bytes / 4 * width + samples.tokens * 24
    if step == "cache":
        window = sample * WINDOW
        waiting = window * (1 + workers_within(WAITING_BYTES, window, workers))
    else:
        waiting = _waiting_bytes(getattr(recipe, step), sample, workers, ranks, samples.lengths)
    kept = recipe.data.memory_mb * MB * max(1, workers)
    return HostMemory(
        offloaded=int(offloaded * per_node),
        batches=int(waiting * per_node * 1.5),
        processes=int((PROCESS + kept) * per_node),
        checkpoint=0 if step == "cache" else _checkpoint_copy(parameters, zero, ranks, per_node),
    )


def _checkpoint_copy(parameters: Sequence[Parameter], zero: Zero, ranks: int, per_node: int) -> int:
    """Without ZeRO all ranks hold the same, and the first writes it."""
    if zero.stage == 0:
        return checkpoint_bytes(parameters)
    return MASTER_AND_MOMENTS * shards([p for p in parameters if p.trained], ranks) * per_node


def _waiting_bytes(training: Training, sample: float, workers: int, ranks: int, lengths: tuple[float, ...]) -> float:
    """Bytes of a rank's batches: of the update at hand, and of those that its workers load ahead.

    sample: bytes of one.
    """
    update = math.ceil(training_cuts(training, ranks, lengths).micro_steps)
    at_hand = sample * training.batch_size / ranks
    if not workers:
        return at_hand
    micro_batch = at_hand / update
    workers = workers_within(WAITING_BYTES, micro_batch, workers)
    return at_hand + micro_batch * workers * batches_ahead(update, micro_batch, workers, WAITING_BYTES)
