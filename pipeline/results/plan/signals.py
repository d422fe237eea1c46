"""What stage 2 holds of a cached distribution, by codec: points, or a state and the teacher's head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.loss.matching import matching_rule
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.models import Parameter, PlannedModel

POINT_BYTES = 12
"""Bytes of a cached point on the GPU: its id in int64, its probability in float32."""


def points(recipe: Recipe, vocab: int) -> int:
    """K, the ids of a distribution that stage 2 computes with; `hidden` has none."""
    codec = recipe.cache.codec
    return min(codec.k, vocab) if codec.name == "topk" else recipe.interact.points or codec.points


def distribution_bytes(recipe: Recipe, vocab: int, teacher_width: int) -> int:
    """Bytes of a cached distribution on the GPU."""
    codec = recipe.cache.codec
    if codec.name == "hidden":
        return teacher_width * getattr(torch, codec.dtype).itemsize
    return points(recipe, vocab) * POINT_BYTES


def stored_head(recipe: Recipe, teacher: PlannedModel, student: PlannedModel, vocab: int) -> list[Parameter]:
    """The teacher's head [V, d], where the codec needs it; ZeRO-3 gathers it together with the student's."""
    if recipe.cache.codec.name != "hidden":
        return []
    return [Parameter(student.head_module, vocab * teacher.width)]


def candidates(recipe: Recipe, students: int, teachers: int) -> Sequence[int]:
    """The cached target layers that any of the student's may be matched to."""
    rule = matching_rule(recipe.interact.matching, recipe.interact.temperature)
    return sorted({column for columns in rule.window(students, teachers) for column in columns})
