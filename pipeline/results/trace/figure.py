"""The match map as a picture: lines from student layers to the teacher layers that they followed."""

from __future__ import annotations

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.results.pages.svg import BLUE, INK, WIDTH, inline
from pipeline.results.trace.matches import Matches

WIDEST = 8.0
"""Width of a line in points where a layer had the same match in every update."""


def match_figure(matches: Matches) -> Markup:
    """An SVG element: student layers on the left, teacher layers on the right, deeper ones higher."""
    teachers = sorted({layer for shares in matches.shares.values() for layer in shares})
    height = {layer: _spread(place, len(teachers)) for place, layer in enumerate(teachers)}
    figure = Figure(figsize=(WIDTH, 0.6 + 0.32 * max(len(teachers), len(matches.shares))), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    for place, (student, shares) in enumerate(matches.shares.items()):
        left = _spread(place, len(matches.shares))
        axes.text(-0.03, left, f"student {student}", ha="right", va="center", color=INK)
        for teacher, share in shares.items():
            line = Line2D([0, 1], [left, height[teacher]], linewidth=max(0.3, WIDEST * share), color=BLUE, alpha=0.75)
            axes.add_line(line)
    for teacher, right in height.items():
        axes.text(1.03, right, f"teacher {teacher}", ha="left", va="center", color=INK)
    axes.set(xlim=(-0.5, 1.5), ylim=(-0.08, 1.08))
    return inline(figure, "which teacher layers each student layer was matched to")


def _spread(place: int, count: int) -> float:
    """Places from 0 to 1, evenly; a single one in the middle."""
    return place / (count - 1) if count > 1 else 0.5
