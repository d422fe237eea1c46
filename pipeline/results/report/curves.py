"""The curves of a report: lines that are told apart by colour, dashes and a label at their end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from pipeline.results.pages.svg import BLUE, WIDTH, Views, inline, page_style

Series: TypeAlias = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> (updates, values)."""
Points: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]
"""Name -> (updates, values) that are drawn."""

POINTS = 300
"""Points of a curve at most."""
PALETTE = LinearSegmentedColormap.from_list("curves", [BLUE, "#a855a0", "#c4671f"])
"""From the first curve to the last. From blue to orange for red-green blindness, from cold to warm for blue-yellow
blindness, and all of it of a lightness that stands out on a light page and on a dark one: which leaves too little
lightness to tell neighbours apart, hence DASHES."""
DASHES = ("-", "--", "-.", ":")
"""Of curves in turn, so that neighbours differ."""
LINE = 0.15
"""Height of a label at the end of a curve, in inches."""
AROUND = 0.9
"""Height of title and axis, in inches."""
LONGEST = 16
"""Characters of a name that still fits beside the curves of a narrow figure; longer ones stand below them."""


def curves(series: Series, title: str, unit: str) -> Views:
    """Lines over the updates of a step; on a log scale too, where all values are positive."""
    drawn = {name: _thinned(*found) for name, found in series.items()}
    label = f"{title}, in {unit}, over the updates: {', '.join(series)}"
    positive = all((values > 0).all() for _, values in drawn.values())
    return Views(
        inline(_figure(drawn, title, unit, log=False), label),
        inline(_figure(drawn, title, unit, log=True), f"{label}; log scale") if positive else None,
    )


def _figure(drawn: Points, title: str, unit: str, log: bool) -> Figure:
    with page_style():
        height = max(2.7, AROUND + LINE * len(drawn))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel="update", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if log:
            _log_scale(axes)
        colours = PALETTE(np.linspace(0, 1, len(drawn)))
        for (name, points), colour, dashes in zip(drawn.items(), colours, itertools.cycle(DASHES), strict=False):
            axes.plot(*points, dashes, label=name, color=colour, linewidth=1.5)
        if len(drawn) > 1 and max(map(len, drawn)) > LONGEST:
            figure.legend(loc="outside lower left", frameon=False, handlelength=3)
            figure.set_figheight(height + 0.2 * len(drawn))
        elif len(drawn) > 1:
            label_ends(axes, LINE / (height - AROUND))
    return figure


def _log_scale(axes: Axes) -> None:
    """Labels as on a linear axis: 0.2, not 2 x 10^-1."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def label_ends(axes: Axes, gap: float) -> None:
    """Each curve's name beside its last point, moved up or down where names would overlap. gap: share of the height."""
    ended = [line for line in axes.lines if np.size(line.get_xdata())]
    ends = [np.array(line.get_xydata())[-1] for line in ended]
    axes.autoscale_view()  # else done when drawn, and the ends are not yet where they will be
    wanted = [(axes.transScale + axes.transLimits).transform(end)[1] for end in ends]
    for line, end, height in zip(ended, ends, apart(wanted, gap), strict=True):
        axes.annotate(
            str(line.get_label()), xy=tuple(end), xytext=(1.06, height), textcoords="axes fraction", va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def apart(wanted: Sequence[float], gap: float) -> np.ndarray:
    """Places in 0..1 near the wanted ones and in their order, gap apart or more; without room for that, evenly."""
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    order, offsets = np.argsort(wanted, kind="stable"), gap * np.arange(len(wanted))
    free = np.asarray(wanted, dtype=float)[order] - offsets  # apart as soon as these do not fall
    up, down = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    places = np.empty(len(wanted))
    places[order] = np.clip((up + down) / 2, 0, 1 - gap * (len(wanted) - 1)) + offsets
    return places


def _thinned(updates: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points, means of neighbours; without values that are not finite."""
    x, y = np.asarray(updates, dtype=float), np.asarray(values, dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= POINTS:
        return x, y
    return _means(x), _means(y)


def _means(values: np.ndarray) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(values, POINTS)])
