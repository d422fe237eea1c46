"""The KL of student to teacher layers, as metrics.jsonl has it, in the form of maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Pairs = Sequence[tuple[int, int, float]]
"""(student layer, teacher layer, KL in nat a token) of each pair in the search range."""


@dataclass(frozen=True)
class KlGrid:
    """Maps of one or several updates, with the same layers."""

    students: list[int]
    """S student layers, from the shallowest."""
    teachers: list[int]
    """J teacher layers, from the shallowest."""
    maps: list[np.ndarray]
    """[J, S] of each update, NaN outside the search range."""


def kl_grid(updates: Sequence[Pairs]) -> KlGrid:
    """The maps of some updates."""
    students = sorted({student for pairs in updates for student, _, _ in pairs})
    teachers = sorted({teacher for pairs in updates for _, teacher, _ in pairs})
    maps = [np.full((len(teachers), len(students)), np.nan) for _ in updates]
    for values, pairs in zip(maps, updates, strict=True):
        for student, teacher, value in pairs:
            values[teachers.index(teacher), students.index(student)] = value
    return KlGrid(students, teachers, maps)
