"""What an update's global batch holds, counted over all ranks in one collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.runtime.data.batches import LoadedBatch
from pipeline.runtime.faults.stop import asked_to_stop
from pipeline.runtime.ranks import Ranks, sum_over_ranks


@dataclass(frozen=True)
class UpdateCounts:
    """Sums over all ranks and micro-steps of an update."""

    tokens: int
    """Response tokens."""
    images: int
    """Samples with at least one image."""
    rejected: int
    """Samples that could not be used."""
    real: int
    """Tokens of the samples."""
    computed: int
    """Tokens that the ranks' time goes into: in each micro-step, ranks x those of the largest padded micro-batch."""
    asked: tuple[int, ...]
    """Of each rank, what has asked it to stop (stop.asked_to_stop); all zero where nothing has."""

    @property
    def real_share(self) -> float:
        """Real over computed tokens; 1: no padding, and no rank waits for a larger micro-batch of another."""
        return self.real / max(1, self.computed)


def count_update(micros: Sequence[LoadedBatch], ranks: Ranks, device: torch.device) -> UpdateCounts:
    """Count this rank's micro-batches of an update together with all others'. All ranks must call."""
    sums = torch.tensor([(m.tokens(), m.images(), len(m.rejected), m.real_tokens()) for m in micros]).sum(0)
    columns = torch.zeros(len(micros) + 1, ranks.world, dtype=torch.long)  # each rank fills its own
    columns[:, ranks.rank] = torch.tensor([*(micro.computed_tokens() for micro in micros), asked_to_stop()])
    everything = sum_over_ranks(torch.cat([sums, columns.flatten()]).to(device)).cpu()
    *computed, asked = everything[len(sums) :].view(-1, ranks.world)
    largest = sum(int(micro_step.max()) for micro_step in computed)
    tokens, images, rejected, real = everything[: len(sums)].tolist()
    return UpdateCounts(tokens, images, rejected, real, largest * ranks.world, tuple(asked.tolist()))


@dataclass(frozen=True)
class BatchCounts:
    """Of one micro-step, over all ranks."""

    real: int
    """Tokens of the samples."""
    computed: int
    """As in UpdateCounts."""
    waited: float
    """Seconds that the last rank waited for its data: all others waited for it."""


def count_batch(loaded: LoadedBatch, waited: float, ranks: Ranks) -> BatchCounts:
    """Count this rank's batch, for which it waited so many seconds, together with all others'. All ranks must call."""
    columns = torch.zeros(3, ranks.world, dtype=torch.float64)  # each rank fills its own
    columns[:, ranks.rank] = torch.tensor([loaded.real_tokens(), loaded.computed_tokens(), waited])
    real, computed, waits = sum_over_ranks(columns.to(ranks.device)).cpu()
    return BatchCounts(int(real.sum()), int(computed.max()) * ranks.world, float(waits.max()))
