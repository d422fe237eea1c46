"""What sorting global batches and loading an update ahead are worth, beside the cut and the loader of before.

    python -m bench.steps.batches          counts and prints both tables, and writes bench/results/batches.json

Real share: tokens of the samples over those that ranks compute or wait for; a count, on drawn lengths. Data wait: the
project's loader, with workers that sleep as long as a sample is to take, before a step that sleeps as well: what is
compared is the order of waiting, not the machine. The workers make samples a quarter faster than the step uses them, so
any waiting is the loader's doing.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset

from bench.timing import machine, write_results
from pipeline.recipe.schema import Training
from pipeline.results.plan.lengths import assumed_lengths
from pipeline.runtime.data import loader
from pipeline.runtime.data.batches import SampleIndex
from pipeline.runtime.data.cutting import cut

SEED, UPDATES, LONGEST = 0, 20, 4096
MEAN = 899
"""Tokens, before the longest are cut."""
BATCH = 512
"""Samples of an update, as in the paper's stage 2."""
LAYOUTS = ((8, 1), (8, 4), (8, 8), (64, 1), (64, 4))
"""(ranks, micro_batch_size)"""
CUTS = ("before", "sorted", "micro_batch_tokens", "packed")
SAMPLE_S, SPARE = 0.05, 1.25
"""Time to make a sample in a worker; the step takes so many times what the workers need for its samples."""
BEFORE_AHEAD = 2
"""Micro-batches a worker, whatever the accumulation."""


def drawn_lengths(draws: random.Random, count: int) -> list[float]:
    """Tokens of samples of mixed instruction data, as `plan` assumes them."""
    return assumed_lengths(draws, count, MEAN, LONGEST)


def real_share(updates: list[list[float]], training: Training, world: int, by_length: bool) -> tuple[float, float]:
    """(real share, micro-steps of an update) over some updates, each a list of lengths."""
    real = computed = steps = 0.0
    for lengths in updates:
        micro_steps = cut(lengths, float if by_length else None, training, world)
        steps += len(micro_steps)
        real += sum(lengths)
        computed += sum(world * max(len(part) * max(part, default=0.0) for part in step) for step in micro_steps)
    return real / computed, steps / len(updates)


def packed_share(updates: list[list[float]], tokens: int, world: int) -> tuple[float, float]:
    """The same without padding: samples end to end, in as few micro-steps as the tokens of a micro-batch allow.

    Longest first, each to the rank and micro-step that has the least: nearly all that packing could gain.
    """
    real = computed = steps = 0.0
    for lengths in updates:
        count = math.ceil(sum(lengths) / (world * tokens))
        while max(parts := _even_parts(lengths, world * count)) > tokens:
            count += 1
        steps += count
        real += sum(lengths)
        computed += world * sum(sorted(parts, reverse=True)[::world])
    return real / computed, steps / len(updates)


def _even_parts(lengths: list[float], count: int) -> list[float]:
    parts = [0.0] * count
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(parts, parts[0] + length)
    return parts


def count_shares() -> dict[str, Any]:
    """Real shares of all layouts: as the samples come (before), sorted, sorted under a budget of as many tokens, and
    packed into that budget without padding, which the project does not do.
    """
    draws = random.Random(SEED)
    updates = [drawn_lengths(draws, BATCH) for _ in range(UPDATES)]
    mean = statistics.mean(statistics.mean(lengths) for lengths in updates)
    found: dict[str, Any] = {"mean_length": round(mean, 1), "batch": BATCH}
    for world, micro in LAYOUTS:
        training = Training(steps=1, batch_size=BATCH, micro_batch_size=micro)
        budget = training.model_copy(update={"micro_batch_tokens": micro * LONGEST})
        cuts = {"before": (training, False), "sorted": (training, True), "micro_batch_tokens": (budget, True)}
        entry: dict[str, Any] = {"micro_batch_tokens_set": micro * LONGEST}
        for name, (how, by_length) in cuts.items():
            share, steps = real_share(updates, how, world, by_length)
            entry[name] = {"real_share": round(share, 3), "micro_steps": round(steps, 1)}
        share, steps = packed_share(updates, micro * LONGEST, world)
        entry["packed"] = {"real_share": round(share, 3), "micro_steps": round(steps, 1)}
        found[f"{world} ranks x {micro}"] = entry
    return found


class _Slow(Dataset):
    """Samples that take their time and no core."""

    def __getitem__(self, index: SampleIndex) -> int:
        time.sleep(SAMPLE_S)
        return index.sample


@dataclass(frozen=True)
class _Nothing:
    """A loaded micro-batch without content."""

    samples: list[int]

    def nbytes(self) -> int:
        return 0


def data_wait(accumulation: int, workers: int, ahead: int, updates: int = 8) -> float:
    """Share of the time that a step waits, after two updates to start, which are not counted."""
    indices: Iterator[list[SampleIndex]] = ([SampleIndex(n)] for n in range(accumulation * updates))
    loaded = loader._load(_Slow(), indices, workers, "cpu", _Nothing, ahead)  # type: ignore[arg-type]
    waits, computes = [], SPARE * SAMPLE_S * accumulation / workers
    for _ in range(updates):
        begun = time.monotonic()
        for _ in range(accumulation):
            next(loaded)
        waits.append(time.monotonic() - begun)
        time.sleep(computes)
    return sum(waits[2:]) / (sum(waits[2:]) + computes * (updates - 2))


def measure_waits() -> dict[str, Any]:
    """Data wait with the loader of before and with that of today."""
    return {
        f"accumulation {accumulation}, {workers} workers": {
            "before": round(data_wait(accumulation, workers, BEFORE_AHEAD), 3),
            "update_ahead": round(
                data_wait(accumulation, workers, loader.batches_ahead(accumulation, 0, workers, 0)), 3
            ),
        }
        for accumulation, workers in ((8, 2), (16, 2), (16, 4))
    }


def show(shares: dict[str, Any], waits: dict[str, Any], console: Console) -> None:
    """Print both tables."""
    table = Table(
        title=f"Real share of computed tokens (micro-steps); {BATCH} samples of {shares['mean_length']} tokens"
    )
    for column in ("ranks x micro-batch", *CUTS):
        table.add_column(column)
    for layout, entry in shares.items():
        if isinstance(entry, dict):
            cells = [entry[name] for name in CUTS]
            table.add_row(layout, *(f"{cell['real_share']:.0%} ({cell['micro_steps']:.0f})" for cell in cells))
    console.print(table)
    table = Table(title="Share of the time that a step waits for data")
    for column in ("loader", "before", "an update ahead"):
        table.add_column(column)
    for name, entry in waits.items():
        table.add_row(name, f"{entry['before']:.1%}", f"{entry['update_ahead']:.1%}")
    console.print(table)


def main() -> None:
    """Count, measure, print and write."""
    shares, waits, console = count_shares(), measure_waits(), Console()
    show(shares, waits, console)
    console.print(f"written: {write_results('batches', {**machine(), 'real_share': shares, 'data_wait': waits})}")


if __name__ == "__main__":
    main()
