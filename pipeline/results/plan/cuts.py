"""How much of what ranks compute or wait for is real: batches of lengths like the data's, cut as a run cuts them.

A micro-batch is padded to its longest sample, and all ranks wait for the one whose micro-batch is the largest.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.recipe.schema import Training
from pipeline.runtime.data.cutting import cut, needs_lengths
from pipeline.runtime.data.loader import by_length

SEED, UPDATES, WINDOWS = 0, 8, 8
"""Of the draws; updates that are cut, and windows of each rank."""


@dataclass(frozen=True)
class Cuts:
    """The mean over what was cut."""

    real_share: float
    """Tokens of the samples over those that ranks compute or wait for: `real_share` of metrics.jsonl."""
    micro_steps: float
    """Of an update; of the cache: batches of a window."""


@lru_cache
def training_cuts(training: Training, ranks: int, lengths: tuple[float, ...]) -> Cuts:
    """Of updates whose samples have lengths drawn from these."""
    draws, length = random.Random(SEED), float if needs_lengths(training, ranks) else None
    updates = [draws.choices(lengths, k=training.batch_size) for _ in range(UPDATES)]
    steps = [step for update in updates for step in cut(update, length, training, ranks)]
    return Cuts(_real_share(steps, ranks), len(steps) / UPDATES)


@lru_cache
def cache_cuts(batch_tokens: int, window: int, ranks: int, lengths: tuple[float, ...]) -> Cuts:
    """Of a cache job: each rank cuts its own windows of so many samples, and the ranks meet after each batch."""
    draws = random.Random(SEED)
    every = [_batches(draws, lengths, window, batch_tokens) for _ in range(ranks)]
    steps = list(zip(*every, strict=False))  # without the end, where ranks that are through wait for the last
    return Cuts(_real_share(steps, ranks), sum(map(len, every)) / (ranks * WINDOWS))


def _batches(draws: random.Random, lengths: Sequence[float], window: int, most_tokens: int) -> list[list[float]]:
    windows = (draws.choices(lengths, k=window) for _ in range(WINDOWS))
    return [batch for samples in windows for batch in by_length(samples, float, most_tokens)]


def _real_share(steps: Sequence[Iterable[Sequence[float]]], ranks: int) -> float:
    """steps: the micro-batches of all ranks, step by step."""
    real = computed = 0.0
    for step in steps:
        real += sum(map(sum, step))
        computed += ranks * max(len(part) * max(part, default=0.0) for part in step)
    return real / computed
