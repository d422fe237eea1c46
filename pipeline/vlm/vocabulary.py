"""The common vocabulary: the ids that mean the same token to teacher and student."""

from __future__ import annotations

from typing import Any

from pipeline.errors import RecipeError


def common_vocabulary(teacher: Any, student: Any, teacher_rows: int, student_rows: int) -> int:
    """Number of ids below the smaller of the two heads' rows, all of them the same token in both tokenizers.

    Heads differ by padding rows (Qwen2-VL 2B has 151,936, 72B 152,064). Raises RecipeError naming the first token that
    differs: the method compares distributions over the same vocabulary (paper, limitations).
    """
    common = min(teacher_rows, student_rows)
    theirs, ours = _by_id(teacher), _by_id(student)
    for index in range(common):
        if theirs.get(index) != ours.get(index):
            raise RecipeError(
                f"teacher and student do not share a tokenizer: token {index} is {theirs.get(index)!r} to the teacher "
                f"and {ours.get(index)!r} to the student; choose models of one family (teacher.path, student.path)"
            )
    return common


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
