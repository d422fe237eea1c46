"""Which answers changed between the untouched and the distilled student, by the samples that each had wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.results.evaluate.comparison import asked_otherwise

BEFORE, AFTER = "untouched", "distilled"
Result = Mapping[str, Any]
"""A model's result in evaluation.json."""


@dataclass(frozen=True)
class Change:
    """The held-out samples whose answers went one way."""

    way: str
    samples: int
    key: str
    """The first of them, by key: the one to look at. Empty where there is none."""


def read_evaluation(run: Path) -> dict[str, Result]:
    """{model: its result} of RUN/evaluation.json; empty before the run was evaluated."""
    path = run / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def compared(run: Path, evaluation: Mapping[str, Result]) -> tuple[Result, Result] | None:
    """Results of the untouched and of the run's distilled student; None where not both were asked alike.

    The distilled student is the result of that name, or that of RUN/student under another, as in the demo.
    """
    student = (run / "student").resolve()
    named = (found for found in evaluation.values() if found.get("model") and Path(found["model"]).resolve() == student)
    before, after = evaluation.get(BEFORE, {}), evaluation.get(AFTER) or next(named, {})
    if "wrong" not in before or "wrong" not in after or asked_otherwise(before, after):
        return None
    return before, after


def changes(before: Result, after: Result) -> list[Change]:
    """Wrong to right, right to wrong, and wrong in both, with the first sample of each."""
    unusable = {one["key"] for result in (before, after) for one in result.get("rejected", [])}
    was, now = set(before["wrong"]) - unusable, set(after["wrong"]) - unusable
    ways = {"wrong to right": was - now, "right to wrong": now - was, "wrong in both": was & now}
    return [Change(way, len(keys), min(keys, default="")) for way, keys in ways.items()]
