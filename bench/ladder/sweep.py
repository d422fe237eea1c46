"""The learning-rate sweep: the same grid for all arms, on seeds that are not quoted."""

from __future__ import annotations

from pathlib import Path

from bench.ladder.arms import BY_NAME, Arm
from bench.ladder.cells import SWEEP_SEEDS, Cell, Scale
from bench.ladder.plan import SeedFolder, Tried


def swept_arm(arm: Arm) -> Arm:
    """The arm whose sweep decides: itself, or the one whose learning rate it takes."""
    return BY_NAME[arm.rate_of] if arm.rate_of else arm


def settings_to_try(scale: Scale, arm: Arm) -> list[Tried]:
    """The settings of an arm's sweep."""
    return [Tried(arm, rate, factor) for rate in scale.learning_rates for factor in arm.factors]


def sweep(folder: Path, cell: Cell, scale: Scale, arm: Arm) -> dict[Tried, float]:
    """{setting: mean exact match over the sweep's seeds}, as far as they ran."""
    found = [SeedFolder(folder / cell.name, cell, seed, other_task=False).results() for seed in SWEEP_SEEDS]
    tried = [one for one in settings_to_try(scale, arm) if all(one.name in results for results in found)]
    return {one: sum(results[one.name]["exact_match"] for results in found) / len(found) for one in tried}


def choose(folder: Path, cell: Cell, scale: Scale, arm: Arm) -> Tried:
    """The arm with the settings that did best in the sweep; with the grid's first where there was none."""
    deciding = swept_arm(arm)
    means = sweep(folder, cell, scale, deciding)
    best = max(means, key=means.__getitem__) if means else settings_to_try(scale, deciding)[0]
    return Tried(arm, best.learning_rate, best.factor if deciding is arm else 1.0)
