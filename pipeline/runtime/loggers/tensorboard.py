"""TensorBoard: RUN/tensorboard/STEP, with the KL of student to teacher layers as images and matches as histograms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pipeline.runtime.loggers.interface import Line, StepLog, scalars
from pipeline.runtime.loggers.pictures import RecentMatches, kl_figure


class TensorBoard:
    """Event files. On resume the new one says from which update on the older ones do not count (purge_step)."""

    def __init__(self, log: StepLog):
        done = log.first_update
        purge = None if done is None else done + 1
        self._board = SummaryWriter(str(log.run / "tensorboard" / log.step), purge_step=purge)
        self._matches = RecentMatches(log.kept)

    def write(self, line: Line) -> None:
        """Show one line, on rank 0."""
        update = line["update"]
        for name, value in scalars(line):
            self._board.add_scalar(name, value, update)
        if line.get("kl"):
            self._board.add_figure("kl", kl_figure(line["kl"]), update)
        for student, (teachers, edges) in self._matches.add(line).items():
            self._board.add_histogram(f"match/{student}", teachers, update, bins=edges)

    def close(self) -> None:
        """Write what is left."""
        self._board.close()


def write_texts(run: Path, name: str, texts: Mapping[str, str]) -> None:
    """Show texts in Markdown, once for the run; those that were shown under this name before no longer count."""
    with SummaryWriter(str(run / "tensorboard" / name), purge_step=0) as board:
        for title, text in texts.items():
            board.add_text(title, text, 0)
