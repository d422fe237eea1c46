"""Exact match of answers after normalisation, and the question-only baseline. Does not import torch."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SampleError
from pipeline.results.evaluate.comparison import share_interval
from pipeline.vlm.chat_template import after_thinking

NORMALISATION = (
    "Unicode NFKC, lower case, white space collapsed and stripped, one or more of . , ; : ! ? stripped at the end "
    "unless nothing else is left"
)
"""What `normalise` does, as the help text and the table state it."""


def normalise(text: str) -> str:
    """Normalise an answer for comparison; see NORMALISATION. Articles are kept."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return text.rstrip(".,;:!? ") or text


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer equals the reference answer after normalisation, or what follows the reference's thinking."""
    return normalise(answer) in (normalise(reference), normalise(after_thinking(reference) or reference))


@dataclass(frozen=True)
class Exchange:
    """The last question of a chat, the turns before it, and the reference answer."""

    messages: Sequence[Mapping[str, Any]]
    """All turns before the last assistant turn."""
    images: Sequence[bytes]
    """Images of these turns, in order."""
    question: str
    """Text of the last user turn."""
    answer: str
    """Text of the last assistant turn."""
    question_type: str | None = None
    """`question_type` of the record; None if it has none."""


def last_exchange(record: Mapping[str, Any], images: Sequence[bytes]) -> Exchange:
    """Split a record before its last assistant turn. Raises SampleError if it has none."""
    messages = record["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise SampleError("no assistant turn")
    before = messages[: turns[-1]]
    question, answer = list(_questions_and_answers(record))[-1]
    return Exchange(before, images_of(before, images), question, answer, record.get("question_type"))


def images_of(messages: Sequence[Mapping[str, Any]], images: Sequence[bytes]) -> Sequence[bytes]:
    """The images that the first turns of a chat show, of all its images."""
    return images[: sum(part["type"] == "image" for message in messages for part in message["content"])]


class QuestionOnly:
    """Majority baseline: the most common answer to the same question in other data, without the image."""

    def __init__(self, records: Iterable[Mapping[str, Any]]):
        """Count every question and answer of the records. Raises ValueError if there are none."""
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for record in records:
            for question, answer in _questions_and_answers(record):
                answers[normalise(question)][normalise(answer)] += 1
                overall[normalise(answer)] += 1
        if not overall:
            raise ValueError("no question with an answer to learn from")
        self._best = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
        self._overall = overall.most_common(1)[0][0]

    def __call__(self, question: str) -> str:
        """The normalised answer; for a question that was not counted, the most common answer overall."""
        return self._best.get(normalise(question), self._overall)


class Tally:
    """Counts of correct answers, in total and by question type."""

    def __init__(self) -> None:
        self._right: Counter[str | None] = Counter()
        self._asked: Counter[str | None] = Counter()

    def count(self, question_type: str | None, right: bool) -> None:
        """Count one answer."""
        self._asked[question_type] += 1
        self._right[question_type] += right

    @property
    def samples(self) -> int:
        """Number of answers counted."""
        return self._asked.total()

    def summary(self) -> dict[str, Any]:
        """{"exact_match": share, "samples": count, "low", "high": its 95 % interval}.

        With question types also "by_type": {type: {"exact_match", "samples"}}.
        """
        types = sorted(question_type for question_type in self._asked if question_type is not None)
        by_type = {
            question_type: _share(self._right[question_type], self._asked[question_type]) for question_type in types
        }
        low, high = share_interval(self._right.total(), self.samples)
        whole = {**_share(self._right.total(), self.samples), "low": low, "high": high}
        return {**whole, **({"by_type": by_type} if by_type else {})}


def _share(right: int, asked: int) -> dict[str, Any]:
    return {"exact_match": right / asked if asked else 0.0, "samples": asked}


def _questions_and_answers(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(question, answer) of each assistant turn; the question is the text of the nearest user turn before it."""
    question = ""
    for message in record["messages"]:
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
        if message["role"] == "user":
            question = text
        elif message["role"] == "assistant":
            yield question, text
