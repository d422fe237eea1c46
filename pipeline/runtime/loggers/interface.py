"""What a logger is: something that shows the lines of metrics.jsonl, which stays the source of truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Line = Mapping[str, Any]
"""A line of metrics.jsonl: the step, the update (from 1), the time, and the update's values."""


@dataclass(frozen=True)
class StepLog:
    """The step whose lines are to be shown, and where it stands."""

    run: Path
    """The run's folder; a logger keeps its files in a folder of its own there."""
    step: str
    """Name of the step."""
    first_update: int | None
    """Updates that are done: a stopped job may have shown later ones, which come again. None where many jobs share the
    step, each with lines of its own."""
    kept: Sequence[Line] = ()
    """The lines of those updates."""


class Logger(Protocol):
    """Shows a step's lines. Made of a StepLog; no update may stand twice in it after a resume."""

    def write(self, line: Line) -> None:
        """Show one line, on rank 0."""

    def close(self) -> None:
        """Write what is left."""


def scalars(line: Line) -> Iterator[tuple[str, float]]:
    """(name, value) of each number of a line that is no number of an update or a time."""
    for name, value in line.items():
        if isinstance(value, (int, float)) and name not in ("update", "time"):
            yield name, float(value)


def matches(line: Line) -> Iterator[tuple[str, int]]:
    """(student layer, teacher layer) of each pair that was matched in a line's update; none in other steps."""
    students = [name.removeprefix("layer/") for name in line if name.startswith("layer/")]
    for student, teacher in zip(students, line.get("match", ()), strict=False):  # a skipped update has no losses
        if teacher is not None:
            yield student, teacher


def values(line: Line) -> dict[str, float | int]:
    """All that a logger of numbers shows of a line: its scalars, and match/STUDENT for each matched pair."""
    return {**dict(scalars(line)), **{f"match/{student}": teacher for student, teacher in matches(line)}}
