"""The common vocabulary: the ids that mean the same token to teacher and student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import RecipeError

NAMED = 5
"""How many of the tokens that one tokenizer alone has are named."""


@dataclass(frozen=True)
class CommonVocabulary:
    """The ids 0 .. size - 1, over which distributions are taken, and what lies outside."""

    size: int
    """V: number of ids. Those that neither tokenizer has are padding rows of both heads."""
    only_teacher: tuple[str, ...] = ()
    """Tokens that the teacher alone has, in the order of their ids."""
    only_student: tuple[str, ...] = ()
    """Tokens that the student alone has, in the order of their ids."""

    def describe(self) -> str | None:
        """A sentence that names the tokens that are no common ones; None where the tokenizers are the same."""
        own = {"teacher": self.only_teacher, "student": self.only_student}
        named = [f"{_named(tokens)} are the {role}'s alone" for role, tokens in own.items() if tokens]
        if not named:
            return None
        return f"common vocabulary: {self.size:,} ids; {' and '.join(named)}, and get no probability"


def common_vocabulary(teacher: Any, student: Any, teacher_rows: int, student_rows: int) -> CommonVocabulary:
    """The common vocabulary of two tokenizers, whose models' heads have so many rows.

    The same tokenizers: all ids below the smaller head's rows, padding rows too (Qwen2-VL 2B has 151,936, 72B 152,064).
    One with a few added tokens more: the ids up to the last that both have; what was added stands behind it, and is cut
    off. An id before it that one tokenizer lacks is a padding row of that head, as others are. Raises RecipeError
    naming the first id that means different tokens: the method compares distributions over one vocabulary (paper,
    limitations).
    """
    rows = min(teacher_rows, student_rows)
    theirs, ours = _by_id(teacher), _by_id(student)
    both = sorted(theirs.keys() & ours.keys())
    for index in both:
        if theirs[index] != ours[index]:
            raise _different(index, theirs[index], ours[index])
    elsewhere = {token: index for index, token in ours.items()}
    for index in sorted(theirs.keys() - ours.keys()):
        if theirs[index] in elsewhere:  # one token, two ids
            raise _different(index, theirs[index], f"id {elsewhere[theirs[index]]}")
    if theirs.keys() == ours.keys():
        return CommonVocabulary(rows)
    size = min(rows, max(both, default=-1) + 1)
    if not size:
        raise RecipeError(f"teacher and student have no token in common; {_ADVICE}")
    return CommonVocabulary(size, _alone(theirs, ours), _alone(ours, theirs))


_ADVICE = (
    "choose models of one family (teacher.path, student.path), or let ids be mapped by their text (vocabulary: mapped)"
)


def _different(index: int, to_teacher: str, to_student: str) -> RecipeError:
    return RecipeError(
        f"teacher and student do not share a tokenizer: token {index} is {to_teacher!r} to the teacher "
        f"and {to_student!r} to the student; {_ADVICE}"
    )


def _alone(tokens: dict[int, str], others: dict[int, str]) -> tuple[str, ...]:
    return tuple(tokens[index] for index in sorted(tokens.keys() - others.keys()))


def _named(tokens: tuple[str, ...]) -> str:
    more = f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else ""
    return ", ".join(tokens[:NAMED]) + more


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
