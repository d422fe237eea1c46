"""The ladder as a figure: a panel for each cell with five seeds, a row for each arm, a dot for each seed."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from bench.ladder.arms import ARMS, LAYERS, NO_TEACHER, VARIANTS

COLOURS = {NO_TEACHER: "#777777", LAYERS: "#0072b2", VARIANTS: "#56b4e9"}
"""Okabe and Ito's palette, which the colour-blind can tell apart; all other groups are orange."""
OTHER = "#d55e00"
QUOTED = 5
"""Cells with so many seeds are shown."""


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the figure as SVG, the same bytes for the same results."""
    panels = {name: cell for name, cell in cells.items() if _seeds(cell) >= QUOTED}
    if not panels:
        return
    arms = [arm for arm in ARMS if any(arm.name in cell["arms"] for cell in panels.values())]
    size = (2 + 3 * len(panels), 1.2 + 0.26 * len(arms))
    matplotlib.rcParams["svg.hashsalt"] = "ladder"
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, cell in zip(axes[0], panels.values(), strict=True):
        _panel(axis, cell, arms)
    axes[0][0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes[0][0].set_ylim(len(arms) - 0.4, -0.6)  # the first arm at the top
    figure.suptitle(
        "dot: a seed; line: 95 % of the mean; dashed: the teacher; dotted: the untouched student", fontsize=8
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _seeds(cell: dict[str, Any]) -> int:
    return max(len(arm["seeds"]) for arm in cell["arms"].values())


def _panel(axis: Any, cell: dict[str, Any], arms: list) -> None:
    for row, arm in enumerate(arms):
        found = cell["arms"].get(arm.name)
        if found is None:
            continue
        colour = COLOURS.get(arm.group, OTHER)
        axis.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2)
        axis.plot(list(found["seeds"].values()), [row] * len(found["seeds"]), ".", color=colour, alpha=0.5)
        axis.plot(found["mean"], row, "o", color=colour)
    for model, style in (("teacher", "--"), ("untouched", ":")):
        axis.axvline(cell[model]["mean"], color="black", linestyle=style, linewidth=0.8)
    axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(textwrap.fill(cell["text"], 32), fontsize=9)
    axis.set_xlabel("exact match", fontsize=8)
