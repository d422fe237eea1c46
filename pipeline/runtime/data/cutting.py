"""Cut a global batch, sorted by length, into micro-batches: those of one micro-step have samples of like lengths.

All ranks wait for the slowest in each micro-step, and a micro-batch is padded to its longest sample. So what a
micro-step costs is its largest padded micro-batch, and neighbours in length belong together.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from pipeline.recipe.checks import accumulation
from pipeline.recipe.schema import Training

Sample = TypeVar("Sample")


def needs_lengths(training: Training, world: int) -> bool:
    """Whether lengths change anything: with a single micro-step, all ranks wait for the longest sample anyway."""
    return training.micro_batch_tokens is not None or accumulation(training, world) > 1


def cut(
    batch: Sequence[Sample], length: Callable[[Sample], float] | None, training: Training, world: int
) -> list[list[list[Sample]]]:
    """The samples of a global batch as [micro-step][rank] lists, the longest first; every rank has one in each.

    length: a sample's tokens. None: samples stay in their order. A rank's list may be empty where the batch has too few
    samples for all ranks. The result depends on the arguments alone.
    """
    if length is None:
        return _micro_steps(batch, [training.micro_batch_size] * -(-len(batch) // training.micro_batch_size), world)
    lengths = {position: length(sample) for position, sample in enumerate(batch)}
    order = sorted(lengths, key=lambda position: -lengths[position])  # stable: equal ones stay in the batch's order
    ordered = [batch[position] for position in order]
    if training.micro_batch_tokens is None:
        return cut(ordered, None, training, world)
    counts = counts_within([lengths[position] for position in order], training.micro_batch_tokens, world)
    return _micro_steps(ordered, counts, world)


def counts_within(lengths: Sequence[float], tokens: int, world: int) -> list[int]:
    """Samples of each micro-batch, where lengths fall: count x first length <= tokens, or a single longer sample.

    The number of micro-batches is the smallest multiple of `world` that is enough. Then the largest of them is as small
    as it can be: the limit is lowered as far as the number stays. Where samples are left over for fewer micro-batches,
    the largest are halved; a micro-batch of 0 samples is the last resort.
    """
    wanted = math.ceil(len(_greedy(lengths, tokens)) / world) * world
    limit = bisect_left(range(tokens), True, key=lambda limit: len(_greedy(lengths, limit)) <= wanted)
    counts = _greedy(lengths, limit)
    while len(counts) < wanted:
        counts = _halve_largest(counts, lengths)
    return counts


def _greedy(lengths: Sequence[float], tokens: int) -> list[int]:
    """As many samples as fit into each micro-batch in turn. No cut with this limit has fewer micro-batches."""
    counts, start = [], 0
    while start < len(lengths):
        counts.append(min(max(1, int(tokens // lengths[start])), len(lengths) - start))
        start += counts[-1]
    return counts


def _halve_largest(counts: list[int], lengths: Sequence[float]) -> list[int]:
    """One micro-batch more: of those with several samples, the one of most padded tokens becomes two."""
    starts = list(accumulate(counts, initial=0))
    several = [place for place, count in enumerate(counts) if count > 1]
    if not several:
        return [*counts, 0]
    place = max(several, key=lambda place: counts[place] * lengths[starts[place]])
    half = counts[place] // 2
    return [*counts[:place], half, counts[place] - half, *counts[place + 1 :]]


def _micro_steps(samples: Sequence[Sample], counts: Sequence[int], world: int) -> list[list[list[Sample]]]:
    """Neighbouring micro-batches, of so many samples each, side by side on the ranks."""
    parts, start = [], 0
    for count in counts:
        parts.append(list(samples[start : start + count]))
        start += count
    return [parts[first : first + world] for first in range(0, len(parts), world)]
