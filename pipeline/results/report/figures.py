"""The maps and bars of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.results.pages.svg import BLUE, WIDTH, Views, inline, page_style
from pipeline.runtime.display.kl_grid import kl_grid

Lines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl of one step."""

BINS = 60
"""Parts of a step in a map over time."""
COLOURS = "cividis"
"""Told apart by lightness, for every kind of colour vision."""


def match_maps(lines: Lines, students: Sequence[int]) -> Iterator[Views]:
    """How often each student layer was matched to each teacher layer, over time (paper, Figure 5)."""
    teachers = sorted({layer for line in lines for layer in line["match"] if layer is not None})
    parts = np.array_split(np.arange(len(lines)), min(BINS, len(lines)))
    for place, student in enumerate(students):
        share = [
            [np.mean([lines[at]["match"][place] == teacher for at in part]) for part in parts] for teacher in teachers
        ]
        with page_style():
            figure, axes = _map_axes(f"matches of student layer {student}", len(teachers))
            axes.set(xlabel="update", xlim=(lines[0]["update"], lines[-1]["update"] + 1))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _draw(axes, share, teachers, 1, "share", extent=(*axes.get_xlim(), -0.5, len(teachers) - 0.5))
        yield Views(inline(figure, f"share of the matches of student layer {student}, over the updates"))


def kl_maps(lines: Lines) -> Iterator[Views]:
    """KL of each student layer to each teacher layer at the beginning, in the middle and at the end."""
    lines = [line for line in lines if line.get("kl")]
    if not lines:
        return
    shown = list({line["update"]: line for line in (lines[0], lines[len(lines) // 2], lines[-1])}.values())
    grid = kl_grid([line["kl"] for line in shown])
    largest = max(np.nanmax(values) for values in grid.maps)
    for line, values in zip(shown, grid.maps, strict=True):
        with page_style():
            figure, axes = _map_axes(f"KL at update {line['update']}", len(grid.teachers))
            axes.set_xlabel("student layer")
            every = math.ceil(len(grid.students) / 12)
            axes.set_xticks(range(0, len(grid.students), every), [f"{one}" for one in grid.students[::every]])
            _draw(axes, values, grid.teachers, largest, "nat a token")
        yield Views(inline(figure, f"KL of each student to each teacher layer at update {line['update']}"))


def _map_axes(title: str, teachers: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 1.0 + 0.24 * max(3, teachers)), layout="constrained")
    return figure, figure.add_subplot(title=title, ylabel="teacher layer")


def _draw(axes: Axes, values: Any, teachers: Sequence[int], largest: float, unit: str, extent: Any = None) -> None:
    """values [teachers, any], deepest on top. As one pixel a value, for the page to enlarge: sharp at every size."""
    image = axes.imshow(
        values, aspect="auto", origin="lower", cmap=COLOURS, vmin=0, vmax=largest, interpolation="none", extent=extent
    )
    axes.set_yticks(range(len(teachers)), [f"{layer}" for layer in teachers])
    axes.figure.colorbar(image, ax=axes, label=unit)


def shares(parts: Mapping[str, float], title: str, unit: str) -> Views:
    """Bars, one a name."""
    with page_style():
        figure = Figure(figsize=(WIDTH, 0.7 + 0.3 * len(parts)), layout="constrained")
        axes = figure.add_subplot(title=f"{title}, {unit}")
        axes.xaxis.set_visible(False)  # each bar says its number
        axes.spines["bottom"].set_visible(False)
        bars = axes.barh(list(parts), list(parts.values()), color=BLUE)
        axes.bar_label(bars, fmt=" %.3g")
        axes.invert_yaxis()
    label = f"{title}, in {unit}: " + ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return Views(inline(figure, label))
