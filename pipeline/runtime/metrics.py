"""metrics.jsonl, one line an update: the source of truth, and what loggers show of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.shards import write_file
from pipeline.runtime.folder import append_lines, read_metrics
from pipeline.runtime.loggers.interface import Line, Logger, StepLog

SHARED = ("tensorboard",)
"""The loggers of a step that many jobs share: each job writes event files of its own."""


class Metrics:
    """Appends to RUN/metrics.jsonl and shows each line in the loggers; a resumed step goes on after its checkpoint."""

    def __init__(self, run: Path, step: str, first_update: int | None, log_to: Sequence[str] = SHARED):
        """Lines of this step after first_update are dropped: a stopped job wrote them, this one makes them again.

        None for a step that many jobs share: all lines stay, and the file too, in which others are writing. log_to: as
        in the recipe.
        """
        run.mkdir(parents=True, exist_ok=True)
        self.step, self._path = step, run / "metrics.jsonl"
        kept = [] if first_update is None else _drop_after(self._path, step, first_update)
        # A shared file is locked for each line. Its jobs write one a shard; an update must not wait for a lock.
        self._lines = None if first_update is None else self._path.open("a", encoding="utf-8")
        log = StepLog(run, step, first_update, kept)
        self._loggers = [_LOGGERS[name](log) for name in log_to]

    def write(self, update: int, values: Mapping[str, Any]) -> None:
        """One line: the step, the update (from 1), the time in s since the epoch, and the values."""
        line = {"step": self.step, "update": update, "time": round(time.time(), 3), **values}
        text = json.dumps(line) + "\n"
        if self._lines is None:
            append_lines(self._path, text)
        else:
            self._lines.write(text)
            self._lines.flush()
        for logger in self._loggers:
            logger.write(line)

    def close(self) -> None:
        """Flush all."""
        if self._lines is not None:
            self._lines.close()
        for logger in self._loggers:
            logger.close()


def _drop_after(path: Path, step: str, first_update: int) -> list[Line]:
    """The step's lines that stay."""
    if not path.is_file():
        return []
    kept = [line for line in read_metrics(path.parent) if line["step"] != step or line["update"] <= first_update]
    write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return [line for line in kept if line["step"] == step]


def _tensorboard(log: StepLog) -> Logger:
    from pipeline.runtime.loggers.tensorboard import TensorBoard  # imports seconds of torch's own

    return TensorBoard(log)


def _wandb(log: StepLog) -> Logger:
    from pipeline.runtime.loggers.wandb import Wandb  # of an extra

    return Wandb(log)


def _trackio(log: StepLog) -> Logger:
    from pipeline.runtime.loggers.trackio import Trackio  # of an extra

    return Trackio(log)


_LOGGERS: Mapping[str, Callable[[StepLog], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
