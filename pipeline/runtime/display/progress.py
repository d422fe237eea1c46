"""What the user sees while a step runs: something that moves on a terminal, lines elsewhere; rank 0 only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0
"""Between two lines of progress where nothing can move."""


@dataclass
class _Output:
    """How this process prints."""

    quiet: bool = False
    json: bool = False


_OUTPUT = _Output()


def choose_output(quiet: bool, log_format: Literal["text", "json"]) -> None:
    """Set how this process prints from now on.

    quiet: no progress; what is said once, warnings and errors stay. json: each line of standard output is an object.
    """
    _OUTPUT.quiet, _OUTPUT.json = quiet, log_format == "json"


@cache
def console() -> Console:
    """The one of this process: a line that is printed through it stands above what moves."""
    return Console(highlight=False)


def moves() -> bool:
    """Whether progress may be drawn again in place: on a terminal that has the characters.

    The file itself is asked: FORCE_COLOR makes rich take a log file for a terminal.
    """
    out = console()
    on_terminal = out.is_interactive and out.file.isatty() and not out.options.ascii_only
    return on_terminal and not (_OUTPUT.quiet or _OUTPUT.json)


def show_cursor() -> None:
    """Give a terminal its cursor back, which what moves has hidden: for a process that ends in the middle of it."""
    if moves():
        console().show_cursor()


def say(text: str, first: bool = True) -> None:
    """Print a line on rank 0."""
    if not first:
        return
    if _OUTPUT.json:
        _print_json({"message": text})
    else:
        console().print(text, markup=False, soft_wrap=True)
        sys.stdout.flush()


def say_progress(text: str, values: Mapping[str, Any]) -> None:
    """Print how far a step is: the text, or as JSON the values; nothing where progress is not wanted."""
    if _OUTPUT.quiet:
        return
    if _OUTPUT.json:
        _print_json(values)
    else:
        say(text)


def size_text(size: float) -> str:
    """Bytes as a person reads them: 1.5 MB."""
    power = min(4, max(0, len(str(int(size))) - 1) // 3)
    return f"{size / 1000**power:,.{1 if power else 0}f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


class Pace:
    """How long the rest takes, at the pace since the beginning, and when the next line of progress is due."""

    def __init__(self, total: int, done: int):
        self.total, self.done = total, done
        self._begun, self._begun_at, self._said = time.monotonic(), done, 0.0

    def left_s(self) -> float | None:
        """Seconds; None before anything is done."""
        rate = (self.done - self._begun_at) / max(1e-9, time.monotonic() - self._begun)
        return (self.total - self.done) / rate if rate > 0 else None

    def eta(self) -> str:
        """1:02:03, or "?" before anything is done."""
        left = self.left_s()
        return "?" if left is None else str(timedelta(seconds=round(left)))

    def is_due(self) -> bool:
        """Whether a line is due: every PLAIN_EVERY_S seconds, and at the end."""
        now = time.monotonic()
        if now - self._said <= PLAIN_EVERY_S and self.done < self.total:
            return False
        self._said = now
        return True

    def values(self, name: str) -> dict[str, Any]:
        """The same for a line of JSON."""
        left = self.left_s()
        return {"step": name, "done": self.done, "of": self.total, "left_s": None if left is None else round(left)}


class StepProgress:
    """Progress of one step that counts something, with its rate and ETA."""

    def __init__(self, name: str, total: int, done: int = 0, shown: bool = True):
        self.name = name
        self._pace = Pace(total, done)
        self._shown = shown
        self._bar: Progress | None = None
        if shown and moves():
            self._bar = Progress(
                TextColumn(f"{name:<10}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console(),
            )
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    @property
    def done(self) -> int:
        """Units done so far."""
        return self._pace.done

    def advance(self, text: str, by: int = 1) -> None:
        """One or more units done; text describes the newest state."""
        self._pace.done += by
        if self._bar is not None:
            self._bar.update(self._task, advance=by, description=text)
        elif self._shown and self._pace.is_due():
            line = f"{self.name}  {self.done}/{self._pace.total}  eta {self._pace.eta()}  {text}"
            say_progress(line, {**self._pace.values(self.name), "state": text})

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()


def _print_json(values: Mapping[str, Any]) -> None:
    # In one piece, also under python -u: other processes write into the same log.
    sys.stdout.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
    sys.stdout.flush()
