"""A teacher and a student whose tokenizers differ: their ids as one another's, and their samples side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.shards import RawSample
from pipeline.errors import RecipeError, SampleError
from pipeline.vlm.alignment import Texts, supervised
from pipeline.vlm.processing import ChatEncoder, Encoded
from pipeline.vlm.token_text import BYTE_NAME, token_texts
from pipeline.vocabulary_map import VocabularyMap


@dataclass(frozen=True)
class Supervised:
    """Which of a sample's response tokens are supervised, for its record in the cache."""

    tokens: np.ndarray
    """[T] the student's ids of these tokens."""
    places: np.ndarray
    """[T + 1]: their numbers among the student's response tokens, from 0; then how many response tokens there are."""


class MappedPair:
    """Two models' tokens by their texts. Loader workers hold a copy."""

    def __init__(self, teacher: ChatEncoder, student: ChatEncoder):
        """Raises RecipeError where a tokenizer's tokens cannot be read as text."""
        self.teacher, self.student = teacher, student
        self._names = tuple(encoder.processor.tokenizer.get_vocab() for encoder in (teacher, student))
        self.texts: tuple[Texts, Texts] = (token_texts(teacher), token_texts(student))

    def vocabulary_map(self, teacher_rows: int, student_rows: int) -> VocabularyMap:
        """Teacher ids as student ids, for heads of so many rows. Rows beyond a tokenizer's last id are none.

        A teacher id becomes the student id that stands for the same bytes, or has the same role. Of several such ids,
        the one of the same name, then the lowest whose name is its text (not <0x41> for A). The rest, and rows
        without a token, are the bucket's. Raises RecipeError where no text is one token to both.
        """
        theirs, ours = self.texts
        teacher_rows, student_rows = min(teacher_rows, max(theirs) + 1), min(student_rows, max(ours) + 1)
        by_text, student_names = self._by_text(student_rows), self._names[1]
        class_of = np.full(teacher_rows, student_rows, np.int32)
        for token, index in self._names[0].items():
            if index < teacher_rows:
                same = student_names.get(token, student_rows)
                alike = same < student_rows and ours[same] == theirs[index]
                class_of[index] = same if alike else by_text.get(theirs[index], student_rows)
        if (class_of == student_rows).all():
            raise RecipeError(
                "vocabulary: mapped: no token of the teacher stands for the same text as one of the student; "
                "choose another pair (teacher.path, student.path)"
            )
        return VocabularyMap(class_of, student_rows)

    def align(self, teacher: Encoded, student: Encoded) -> tuple[Encoded, Encoded, Supervised]:
        """Both forms of a sample, with the tokens alone that both predict after the same text: T of each.

        Raises SampleError where there is none.
        """
        theirs, ours = supervised(_tokens(teacher), _tokens(student), self.texts)
        if not len(ours):
            raise SampleError("no token of teacher and student begins after the same text (vocabulary: mapped)")
        record = Supervised(student.response_ids.numpy()[ours], np.append(ours, int(student.response.sum())))
        return teacher.only(torch.from_numpy(theirs)), student.only(torch.from_numpy(ours)), record

    def _by_text(self, rows: int) -> dict[bytes, int]:
        """{what a student's id stands for: the id}; of several the lowest that is not named by its byte."""
        names, texts = self._names[1], self.texts[1]
        ordered = sorted((BYTE_NAME.match(token) is not None, index) for token, index in names.items() if index < rows)
        return {texts[index]: index for _, index in reversed(ordered)}


def align_both(pair: MappedPair, raw: RawSample, encoded: Mapping[str, Encoded]) -> tuple[dict[str, Encoded], Any]:
    """For a dataset of both models' samples: each in both forms, supervised at the same tokens."""
    teacher, student, _ = pair.align(encoded["teacher"], encoded["student"])
    return {"teacher": teacher, "student": student}, None


def align_teacher(
    pair: MappedPair, raw: RawSample, encoded: Mapping[str, Encoded]
) -> tuple[dict[str, Encoded], Supervised]:
    """For a dataset of the teacher's samples: what the student's form of each lets be supervised."""
    student = pair.student(raw.key, raw.record["messages"], raw.images)
    teacher, _, record = pair.align(encoded["teacher"], student)
    return {"teacher": teacher}, record


def align_student(pair: MappedPair, raw: RawSample, encoded: Mapping[str, Encoded]) -> tuple[dict[str, Encoded], Any]:
    """For a dataset of the student's samples: what the teacher's form of each lets be supervised."""
    teacher = pair.teacher(raw.key, raw.record["messages"], raw.images)
    _, student, _ = pair.align(teacher, encoded["student"])
    return {"student": student}, None


def _tokens(encoded: Encoded) -> list[tuple[int, int]]:
    return list(zip(encoded.turns[encoded.response].tolist(), encoded.response_ids.tolist(), strict=True))
