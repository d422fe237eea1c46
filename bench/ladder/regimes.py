"""How the arms fare as one thing changes: wrong answers, samples, updates; on the puzzles, or as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from bench.ladder.statistics import Interval, interval

ARMS = {
    "finetune": ("#777777", "finetuning"),
    "teacher_answers": ("#d55e00", "on the teacher's answers"),
    "last_layer": ("#e69f00", "last layer's KL"),
    "paper": ("#56b4e9", "the paper's order"),
    "interaction": ("#0072b2", "interaction to the end"),
    "interaction_ce": ("#009e73", "with cross-entropy beside it"),
}
"""Arm -> (colour, label): Okabe and Ito's palette, which the colour-blind can tell apart."""

AXES = {
    "share of wrong answers": ("wrong", ("puzzles-0", "puzzles-20", "puzzles-40", "puzzles-60")),
    "training samples": ("samples", ("puzzles-40-few-samples", "puzzles-40", "puzzles-40-many-samples")),
    "updates": ("updates", ("puzzles-40-few-updates", "puzzles-40", "puzzles-40-many-updates")),
    "updates, easy-VQA": ("updates", ("easy-vqa-40-few-updates", "easy-vqa-40")),
}
"""What changes -> (field of a cell, the cells that differ in it alone)."""


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the figure as SVG; nothing where no panel has two cells."""
    panels = {
        label: (field, present)
        for label, (field, names) in AXES.items()
        if len(present := [cells[name] for name in names if name in cells]) > 1
    }
    if not panels:
        return
    matplotlib.rcParams["svg.hashsalt"] = "ladder"
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 3 * len(panels), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (label, (field, present)) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, field, present)
        axis.set_xlabel(label)
    axes[0][0].set_ylabel("exact match, held out")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(panels), fontsize=8
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axis: Any, field: str, cells: list[dict[str, Any]]) -> None:
    for name, (colour, label) in ARMS.items():
        found = [cell for cell in cells if name in cell["arms"]]
        places, points = [cell[field] for cell in found], over_shared_seeds([cell["arms"][name] for cell in found])
        axis.plot(places, [point.mean for point in points], "o-", color=colour, label=label, markersize=4)
        for x, point in zip(places, points, strict=True):
            if point.low is not None:
                axis.plot([x, x], [point.low, point.high], color=colour, alpha=0.5)
    if field != "wrong":
        axis.set_xscale("log")
    axis.set_xticks([cell[field] for cell in cells], [f"{cell[field]:g}" for cell in cells])
    axis.minorticks_off()
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)


def over_shared_seeds(arms: list[dict[str, Any]]) -> list[Interval]:
    """An arm's mean and interval in each of several cells, over the seeds that all of them have.

    A seed draws the same puzzles in each, so the line shows what changes, not which seeds a cell has.
    """
    shared = set.intersection(*(set(arm["seeds"]) for arm in arms)) if arms else set()
    return [interval([arm["seeds"][seed] for seed in sorted(shared)]) for arm in arms]
