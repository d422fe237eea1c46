"""Response tokens of one chat under two tokenizers: which of them are predicted after the same text.

A position is supervised where a token of each tokenizer begins after the same bytes of the same assistant turn: then
both models are asked for what comes next. How long the next token is does not matter.

T_t, T_s response tokens of teacher and student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from pipeline.vlm.token_text import END

Texts = Mapping[int, bytes]
"""{id: what it stands for}, as `token_texts` returns it."""


def supervised(
    teacher: Sequence[tuple[int, int]], student: Sequence[tuple[int, int]], texts: tuple[Texts, Texts]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions that both predict after the same text, as indices [T] into the teacher's and the student's responses.

    teacher, student: (turn, id) of each response token. A turn that only one of them has (its sample was cut earlier)
    has no supervised position.
    """
    theirs, ours = (_turns(tokens, of) for tokens, of in zip((teacher, student), texts, strict=True))
    pairs = [
        (theirs[turn][0] + i, ours[turn][0] + j)
        for turn in theirs
        if turn in ours
        for i, j in aligned(theirs[turn][1], ours[turn][1])
    ]
    rows = np.asarray(pairs, np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def aligned(teacher: Sequence[bytes], student: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of tokens of one turn that begin after the same bytes; tokens as what they stand for.

    A turn's end is a token of its own: the ends are a pair where the texts before them are the same but for blanks
    around them, which templates set. Blanks that a first token carries from before the answer, as in " Yes" after
    "ASSISTANT:", are none of the answer: what follows is compared without them.
    """
    theirs, ours = _body(teacher), _body(student)
    text, other = b"".join(theirs), b"".join(ours)
    lead, lead_other = (len(whole) - len(whole.lstrip()) for whole in (text, other))
    same = _common(text[lead:], other[lead_other:])
    first = 0 if text[:lead] != other[:lead_other] else -lead
    starts = {start: i for i, start in _starts(theirs, lead) if first <= start <= same}
    pairs = [(starts[start], j) for j, start in _starts(ours, lead_other) if start in starts]
    if len(theirs) < len(teacher) and len(ours) < len(student) and text.strip() == other.strip():
        pairs.append((len(theirs), len(ours)))
    return pairs


def _body(tokens: Sequence[bytes]) -> Sequence[bytes]:
    """Without the end of the turn, which a sample that was cut does not have."""
    return tokens[:-1] if tokens and tokens[-1] == END else tokens


def _starts(tokens: Sequence[bytes], lead: int) -> list[tuple[int, int]]:
    """(number, first byte) of each token that adds bytes; the answer's first byte is 0."""
    lengths = np.asarray([len(token) for token in tokens], np.int64)
    starts = lengths.cumsum() - lengths - lead
    return [(i, start) for i, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)) if length]


def _common(one: bytes, other: bytes) -> int:
    """Length of the longest common beginning."""
    size = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8)[:size] != np.frombuffer(other, np.uint8)[:size]
    return int(differ.argmax()) if differ.any() else size


def _turns(tokens: Sequence[tuple[int, int]], texts: Texts) -> dict[int, tuple[int, list[bytes]]]:
    """{turn: (number of its first response token, what its tokens stand for)}."""
    found = {}
    for turn, group in groupby(enumerate(tokens), key=lambda item: item[1][0]):
        members = list(group)
        found[turn] = (members[0][0], [texts[index] for _, (_, index) in members])
    return found
