"""Which teacher layers a run's student layers were matched to, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime.folder import read_metrics


@dataclass(frozen=True)
class Matches:
    """Matches of interaction, over the updates that metrics.jsonl has."""

    shares: Mapping[int, Mapping[int, float]]
    """Student layer -> {teacher layer: share of the updates}, shallow layers first."""
    updates: int


def has_matches(line: Mapping[str, Any]) -> bool:
    """Whether a student layer was matched in the line's update; with `matching: last_only` none ever is."""
    return any(layer is not None for layer in line.get("match", ()))


def read_matches(run: Path) -> Matches | None:
    """The matches of a run's interaction, as far as it is; None where it has none.

    Of an update with several micro-steps the match of one, drawn at random, counts: the log has one an update.
    """
    lines = [line for line in read_metrics(run) if line["step"] == "interact" and has_matches(line)]
    if not lines:
        return None
    students = sorted(int(name.removeprefix("layer/")) for name in lines[-1] if name.startswith("layer/"))
    counts: dict[int, Counter[int]] = {layer: Counter() for layer in students}
    for line in lines:
        for student, teacher in zip(students, line["match"], strict=True):
            if teacher is not None:
                counts[student][teacher] += 1
    shares = {
        student: {teacher: count / len(lines) for teacher, count in sorted(found.items())}
        for student, found in counts.items()
    }
    return Matches(shares, len(lines))
