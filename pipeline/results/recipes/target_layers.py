"""Target layers for two models of any depth, in the paper's spacing where it serves."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import RecipeError

EVERY = 4
"""The paper's spacing of both models' target layers (section 4): 2, 6, 10, ..."""
SPARSE_STUDENT, SPARSE_TEACHER = 8, 20
"""The paper's spacings for many image tokens (appendix D): 4, 12, 20 of the student, 10, 30, 50, 70 of the teacher."""


@dataclass(frozen=True)
class Targets:
    """Target layers of both models, and the spacings that gave them."""

    teacher: tuple[int, ...]
    student: tuple[int, ...]
    teacher_every: int
    student_every: int

    @property
    def default(self) -> bool:
        """Whether these are what a recipe without `layers` has."""
        return self.teacher_every == self.student_every == EVERY


def choose_targets(teacher_depth: int, student_depth: int, sparse: bool) -> Targets:
    """The paper's targets; a denser teacher where it would not have more of them than the student.

    sparse: begin with the spacings of appendix D. A student so deep that no teacher spacing gives more gets fewer
    targets, and one so shallow that its spacing gives none gets more. Raises RecipeError where a model has one layer.
    """
    first = SPARSE_STUDENT if sparse else EVERY
    widest = SPARSE_TEACHER if sparse else EVERY
    for student_every in (*range(first, max(first + 1, student_depth)), *range(first - 1, 0, -1)):
        student = spaced(student_depth, student_every)
        for teacher_every in range(widest, 0, -1):
            teacher = spaced(teacher_depth, teacher_every)
            if student and len(teacher) > len(student):
                return Targets(teacher, student, teacher_every, student_every)
    raise RecipeError(
        f"a teacher of {teacher_depth} layers and a student of {student_depth}: expected at least 3 and 2, for two "
        "teacher targets and one of the student below their last layers"
    )


def spaced(depth: int, every: int) -> tuple[int, ...]:
    """Every n-th layer from n / 2 on, counted from 1, below the last: 2, 6, 10, ... for every 4th."""
    return tuple(range(max(1, every // 2), depth, every))
