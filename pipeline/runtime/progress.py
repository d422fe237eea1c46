"""What the user sees while a step runs: a rich bar on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


def say(text: str, first: bool = True) -> None:
    """Print a line on rank 0."""
    if first:
        Console(soft_wrap=True, highlight=False).print(text, markup=False)
        sys.stdout.flush()


def size_text(size: float) -> str:
    """Bytes as a person reads them: 1.5 MB."""
    power = min(4, max(0, len(str(int(size))) - 1) // 3)
    return f"{size / 1000**power:,.{1 if power else 0}f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


class StepProgress:
    """Progress of one step, with its rate and ETA."""

    def __init__(self, name: str, total: int, done: int = 0, shown: bool = True):
        self.name, self.total, self.done = name, total, done
        self._begun, self._begun_at, self._last = time.monotonic(), done, 0.0
        self._shown = shown
        self._bar: Progress | None = None
        if shown and Console().is_terminal:
            self._bar = Progress(
                TextColumn(f"{name:<10}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def advance(self, text: str, by: int = 1) -> None:
        """One or more units done; text describes the newest state."""
        self.done += by
        if self._bar is not None:
            self._bar.update(self._task, advance=by, description=text)
        elif self._shown and (time.monotonic() - self._last > PLAIN_EVERY_S or self.done >= self.total):
            self._last = time.monotonic()
            say(f"{self.name}  {self.done}/{self.total}  eta {self._eta()}  {text}")

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()

    def _eta(self) -> str:
        rate = (self.done - self._begun_at) / max(1e-9, time.monotonic() - self._begun)
        return str(timedelta(seconds=round((self.total - self.done) / rate))) if rate > 0 else "?"
