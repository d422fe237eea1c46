"""metrics.jsonl, one line an update, and the same numbers as TensorBoard files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_prep.shards import write_file
from pipeline.runtime.folder import read_metrics


class Metrics:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard/STEP; a resumed step goes on after its checkpoint."""

    def __init__(self, run: Path, step: str, first_update: int | None):
        """Lines of this step after first_update are dropped: a stopped job wrote them, this one makes them again.

        None for a step that many jobs share: all lines stay, and the file too, in which others are writing.
        """
        run.mkdir(parents=True, exist_ok=True)
        self.step = step
        if first_update is not None:
            _drop_after(run / "metrics.jsonl", step, first_update)
        self._lines = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard" / step), purge_step=first_update or None)

    def write(self, update: int, values: Mapping[str, Any]) -> None:
        """One line: the step, the update (from 1), the time in s since the epoch, and the values."""
        line = {"step": self.step, "update": update, "time": round(time.time(), 3), **values}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in _scalars(values):
            self._board.add_scalar(name, value, update)

    def close(self) -> None:
        """Flush both."""
        self._lines.close()
        self._board.close()


def _drop_after(path: Path, step: str, first_update: int) -> None:
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] != step or line["update"] <= first_update]
    write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _scalars(values: Mapping[str, Any], prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
