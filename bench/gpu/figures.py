"""What a check finds: figures with their goals, in a JSON file that is complete after each of them."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.atomic import write_file

COMPARE: Mapping[str, Callable[..., bool]] = {
    "at most": operator.le,
    "at least": operator.ge,
    "under": operator.lt,
    "between": lambda value, low, high: low <= value <= high,
}
Goal = tuple[str, float] | tuple[str, float, float]
"""A word of COMPARE and its limit, or both."""


@dataclass(frozen=True)
class Figure:
    """A measured number, and what it has to be."""

    name: str
    value: float
    unit: str = ""
    goal: Goal | None = None
    beside: str = ""
    """The figures that it is to be read beside: another package's, the CPU's, the operations' ratio."""

    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        return None if self.goal is None else COMPARE[self.goal[0]](self.value, *self.goal[1:])

    def goal_text(self) -> str:
        """In words, such as "at most 1.15"; empty without a goal."""
        word, *limits = self.goal or ("",)
        return f"{word} {' and '.join(map(str, limits))}".strip()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Figure:
        """The figure that `asdict` turned into JSON."""
        return cls(**{**entry, "goal": tuple(entry["goal"]) if entry["goal"] else None})


class Report:
    """A check's JSON: {"figures": [...], "notes": [...], "details": {...}}, rewritten after each addition.

    So a check that is stopped or crashes keeps what it had found.
    """

    def __init__(self, path: Path):
        self.path = path
        self.figures: list[Figure] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self._write()

    def add(self, name: str, value: float, unit: str = "", goal: Goal | None = None, beside: str = "") -> None:
        """Add a figure. Raises ValueError where it is not finite: no goal could be judged by it."""
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: expected a finite number")
        self.figures.append(Figure(name, float(value), unit, goal, beside))
        self._write()

    def note(self, text: str) -> None:
        """Add a line for the reader, such as why a comparison was left out."""
        self.notes.append(text)
        self._write()

    def detail(self, name: str, value: Any) -> None:
        """Add anything else that JSON can hold."""
        self.details[name] = value
        self._write()

    def _write(self) -> None:
        entry = {"figures": [asdict(figure) for figure in self.figures], "notes": self.notes, "details": self.details}
        write_file(self.path, (json.dumps(entry, indent=2) + "\n").encode())
