"""The curves and maps of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.results.pages.svg import BLUE, inline, page_style
from pipeline.runtime.display.kl_grid import kl_grid

Lines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl of one step."""

BINS = 60
"""Parts of a step in a map over time; curves of longer steps are averaged over parts too."""
POINTS = 300
"""Points of a curve at most."""
COLOURS = "cividis"
"""Told apart by lightness, for every kind of colour vision."""


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, unit: str) -> Markup:
    """Lines over the updates of a step. series: name -> (updates, values)."""
    with page_style():
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel="update", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        # Its palest colours would be lost on white, its darkest on black.
        palette = matplotlib.colormaps[COLOURS](np.linspace(0.35, 0.78, len(series))) if len(series) > 1 else [BLUE]
        for (name, (updates, values)), colour in zip(series.items(), palette, strict=False):
            axes.plot(*_thinned(updates, values), label=name, color=colour, linewidth=1.4)
        if len(series) > 1:
            columns = math.ceil(len(series) / 12)
            legend = axes.legend(frameon=False, fontsize=7, ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))
            legend.set_in_layout(True)
    return inline(figure, f"{title}, in {unit}, over the updates: {', '.join(series)}")


def match_map(lines: Lines, students: Sequence[int]) -> Markup:
    """How often each student layer was matched to each teacher layer, over time (paper, Figure 5)."""
    teachers = sorted({layer for line in lines for layer in line["match"] if layer is not None})
    parts = np.array_split(np.arange(len(lines)), min(BINS, len(lines)))
    with page_style():
        figure = Figure(figsize=(2.6 * len(students), 0.9 + 0.22 * len(teachers)), layout="constrained")
        for place, student in enumerate(students):
            axes = figure.add_subplot(1, len(students), place + 1, title=f"student {student}", xlabel="update")
            share = [
                [np.mean([lines[at]["match"][place] == teacher for at in part]) for part in parts]
                for teacher in teachers
            ]
            bottom, top = lines[0]["update"], lines[-1]["update"] + 1
            axes.imshow(
                share, aspect="auto", origin="lower", cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest",
                extent=(bottom, top, -0.5, len(teachers) - 0.5),
            )  # fmt: skip
            axes.set_yticks(range(len(teachers)), [f"{layer}" for layer in teachers])
            if not place:
                axes.set_ylabel("teacher layer")
    return inline(figure, "share of the matches over time, a map for each student layer, teacher layers from below")


def kl_maps(lines: Lines) -> Markup | None:
    """KL of each student layer to each teacher layer at the beginning, in the middle and at the end; None without."""
    lines = [line for line in lines if line.get("kl")]
    if not lines:
        return None
    shown = [lines[0], lines[len(lines) // 2], lines[-1]]
    grid = kl_grid([line["kl"] for line in shown])
    students, teachers, largest = grid.students, grid.teachers, max(np.nanmax(values) for values in grid.maps)
    with page_style():
        figure = Figure(figsize=(1.2 + 0.42 * len(students) * 3 + 2, 1.0 + 0.26 * len(teachers)), layout="constrained")
        for place, (line, values) in enumerate(zip(shown, grid.maps, strict=True)):
            axes = figure.add_subplot(1, 3, place + 1, title=f"update {line['update']}", xlabel="student layer")
            image = axes.imshow(values, aspect="auto", origin="lower", cmap=COLOURS, vmin=0, vmax=largest)
            axes.set_xticks(range(len(students)), [str(layer) for layer in students])
            axes.set_yticks(range(len(teachers)), [str(layer) for layer in teachers])
            if not place:
                axes.set_ylabel("teacher layer")
        figure.colorbar(image, ax=figure.axes, label="nat a token")
    return inline(
        figure, "KL of each student layer to each teacher layer at the beginning, in the middle and at the end"
    )


def shares(parts: Mapping[str, float], title: str, unit: str) -> Markup:
    """Bars, one a name."""
    with page_style():
        figure = Figure(figsize=(5.6, 0.7 + 0.3 * len(parts)), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(4))  # labels of small numbers are long
        bars = axes.barh(list(parts), list(parts.values()), color=BLUE)
        axes.bar_label(bars, fmt=" %.3g")
        axes.invert_yaxis()
    return inline(figure, f"{title}, in {unit}: " + ", ".join(f"{name} {value:.3g}" for name, value in parts.items()))


def _thinned(updates: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of neighbours."""
    parts = min(POINTS, len(updates))
    x, y = (np.array_split(np.asarray(one, dtype=float), parts) for one in (updates, values))
    return np.array([part.mean() for part in x]), np.array([part.mean() for part in y])
