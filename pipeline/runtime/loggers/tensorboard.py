"""TensorBoard: RUN/tensorboard/STEP, with the KL of student to teacher layers as images and matches as histograms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from pipeline.runtime.kl_grid import Pairs, kl_grid
from pipeline.runtime.loggers.interface import Line, StepLog, matches, scalars

HISTOGRAM_EVERY = 50
"""Updates whose matches make one histogram."""


class TensorBoard:
    """Event files. On resume the new one says from which update on the older ones do not count (purge_step)."""

    def __init__(self, log: StepLog):
        done = log.first_update
        purge = None if done is None else done + 1
        self._board = SummaryWriter(str(log.run / "tensorboard" / log.step), purge_step=purge)
        begun = 0 if done is None else done - done % HISTOGRAM_EVERY
        self._lately = [line for line in log.kept if line["update"] > begun]

    def write(self, line: Line) -> None:
        """Show one line, on rank 0."""
        update = line["update"]
        for name, value in scalars(line):
            self._board.add_scalar(name, value, update)
        if line.get("kl"):
            self._board.add_figure("kl", kl_figure(line["kl"]), update)
        self._lately.append(line)
        if update % HISTOGRAM_EVERY == 0:
            self._add_matches(update)

    def close(self) -> None:
        """Write what is left."""
        self._board.close()

    def _add_matches(self, update: int) -> None:
        """A histogram for each student layer, with a bin for each teacher layer."""
        found: dict[str, list[int]] = defaultdict(list)
        for line in self._lately:
            for student, teacher in matches(line):
                found[student].append(teacher)
        for student, teachers in found.items():
            edges = np.arange(min(teachers) - 0.5, max(teachers) + 1)
            self._board.add_histogram(f"match/{student}", np.array(teachers), update, bins=edges)
        self._lately.clear()


def write_texts(run: Path, name: str, texts: Mapping[str, str]) -> None:
    """Show texts in Markdown, once for the run; those that were shown under this name before no longer count."""
    with SummaryWriter(str(run / "tensorboard" / name), purge_step=0) as board:
        for title, text in texts.items():
            board.add_text(title, text, 0)


def kl_figure(pairs: Pairs) -> Figure:
    """The KL of all pairs as a map; pairs outside the search range are blank."""
    grid = kl_grid([pairs])
    students, teachers, (values,) = grid.students, grid.teachers, grid.maps
    figure = Figure(figsize=(2 + 0.5 * len(students), 1.5 + 0.25 * len(teachers)), layout="constrained")
    axes = figure.add_subplot(xlabel="student layer", ylabel="teacher layer")
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="cividis", vmin=0)
    axes.set_xticks(range(len(students)), [str(layer) for layer in students])
    axes.set_yticks(range(len(teachers)), [str(layer) for layer in teachers])
    figure.colorbar(image, label="nat a token")
    return figure
