"""What loggers show of interaction besides numbers: the KL of all pairs as a picture, matches as histograms."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.runtime.display.kl_grid import Pairs, kl_grid
from pipeline.runtime.loggers.interface import Line, matches, values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTOGRAM_EVERY = 50
"""Updates whose matches make one histogram."""

Histogram = tuple[np.ndarray, np.ndarray]
"""Teacher layers that were matched, one an update; edges of bins, one bin a teacher layer."""


class RecentMatches:
    """Collects matches, and gives them every HISTOGRAM_EVERY updates."""

    def __init__(self, kept: Sequence[Line] = ()):
        """kept: the lines so far, of which those since the last histogram count."""
        self._lately: list[Line] = []
        for line in kept:
            self.add(line)

    def add(self, line: Line) -> dict[str, Histogram]:
        """Count one line. {student layer: its histogram} after the last update of one, else empty."""
        self._lately.append(line)
        if line["update"] % HISTOGRAM_EVERY:
            return {}
        found: dict[str, list[int]] = defaultdict(list)
        for one in self._lately:
            for student, teacher in matches(one):
                found[student].append(teacher)
        self._lately.clear()
        return {
            student: (np.array(teachers), np.arange(min(teachers) - 0.5, max(teachers) + 1))
            for student, teachers in found.items()
        }


def shown(
    line: Line, recent: RecentMatches, image: Callable[..., Any], histogram: Callable[..., Any]
) -> dict[str, Any]:
    """A line as wandb and trackio take it: values, the KL map and histograms of matches, in their own classes."""
    found: dict[str, Any] = values(line)
    if line.get("kl"):
        found["kl"] = image(as_image(kl_figure(line["kl"])))
    for student, (teachers, edges) in recent.add(line).items():
        found[f"matches/{student}"] = histogram(np_histogram=np.histogram(teachers, edges))
    return found


def kl_figure(pairs: Pairs) -> Figure:
    """The KL of all pairs as a map; pairs outside the search range are blank."""
    from matplotlib.figure import Figure  # slow, and steps that match no layers draw nothing

    grid = kl_grid([pairs])
    students, teachers, (values,) = grid.students, grid.teachers, grid.maps
    figure = Figure(figsize=(2 + 0.5 * len(students), 1.5 + 0.25 * len(teachers)), layout="constrained")
    axes = figure.add_subplot(xlabel="student layer", ylabel="teacher layer")
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="cividis", vmin=0)
    axes.set_xticks(range(len(students)), [str(layer) for layer in students])
    axes.set_yticks(range(len(teachers)), [str(layer) for layer in teachers])
    figure.colorbar(image, label="nat a token")
    return figure


def as_image(figure: Figure) -> Image.Image:
    """A figure as pixels: trackio takes no figures, and wandb only those of a process that has loaded pyplot."""
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return Image.open(written)
