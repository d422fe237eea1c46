"""Questions and answers made from Python's language reference, which every Python installation has (see help()).

T response tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

ANSWER_LENGTH = 600
"""Minimum number of characters of an answer; with this tokenizer about 190 tokens."""


@dataclass(frozen=True)
class Conversation:
    """One question and its answer, as token ids."""

    prompt: Tensor
    """Ids of the chat template up to the start of the answer."""
    response: Tensor
    """[T] ids of the answer and of its end-of-turn token."""


def conversations(tokenizer: Any, seed: int = 0) -> list[Conversation]:
    """All conversations, shuffled. No paragraph is in two of them."""
    answers = _answers()
    random.Random(seed).shuffle(answers)
    found = []
    for topic, answer in answers:
        question = [{"role": "user", "content": f"Tell me about '{topic}' in Python."}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, f"{answer}<|im_end|>")]
        found.append(Conversation(*map(torch.tensor, ids)))
    return found


def _answers() -> list[tuple[str, str]]:
    """(topic, a few of its paragraphs). Topics quote each other at length, so repeated paragraphs are left out."""
    seen: set[str] = set()
    answers = []
    for topic, text in sorted(topics.items()):
        answer: list[str] = []
        for paragraph in text.split("\n\n"):
            if paragraph in seen or not paragraph.strip():
                continue
            seen.add(paragraph)
            answer.append(paragraph)
            if sum(map(len, answer)) >= ANSWER_LENGTH:
                answers.append((topic, "\n\n".join(answer).strip()))
                answer = []
    return answers
