"""Progress of all ranks together, on stderr: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

EVERY_SECONDS = 5.0
"""Between two lines where there is no terminal."""


class Progress:
    """Shows the records of one piece of work, their rate and the time left. Used as a context, it ends its bar."""

    def __init__(self, verb: str, visible: bool = True):
        """verb: such as "examined"; visible: whether this process is the one that shows it."""
        self.verb, self.visible = verb, visible
        self._started = self._shown = time.monotonic()
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.visible and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Bars(*columns, console=Console(stderr=True))
            self._bar.add_task(self.verb, total=None)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.visible and error == (None, None, None):
            print(f"{self._text()} in {_clock(self._seconds())}", file=sys.stderr, flush=True)

    def update(self, done: int, share: float | None) -> None:
        """Show that `done` records are finished, which is `share` of all (0 to 1; None: unknown)."""
        self._done = done
        if self._bar is not None:
            total = {} if share is None else {"total": 1.0, "completed": share}
            self._bar.update(self._bar.task_ids[0], description=self._text(), **total)
        elif self.visible and time.monotonic() - self._shown >= EVERY_SECONDS:
            self._shown = time.monotonic()
            print(self._text() + self._left(share), file=sys.stderr, flush=True)

    def _seconds(self) -> float:
        return max(1e-3, time.monotonic() - self._started)

    def _text(self) -> str:
        return f"{self.verb} {self._done:,} records, {self._done / self._seconds():,.0f}/s"

    def _left(self, share: float | None) -> str:
        if not share:
            return f", {_clock(self._seconds())} so far"
        return f", {share:.0%}, {_clock(self._seconds() * (1 - share) / share)} left"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
