"""A model's chat template: a chat as text, and where in that text the response of each assistant turn stands.

A response is what the model has to generate after the template's generation prompt, up to and including the end-of-turn
token. Templates differ in what they put around an answer:

- The generation prompt may open a thinking block, or the template may insert an empty one. Whatever stands between the
  generation prompt and the answer has to be generated, so it belongs to the response.
- A template may remove the reasoning from earlier turns. What is left of such a turn is context and carries no loss:
  the model is never asked to generate that at this place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import Any

from pipeline.errors import RecipeError, SampleError, as_sample_error

Message = Mapping[str, Any]

PROBES = ([{"type": "image"}, {"type": "text", "text": "What is it?"}], [{"type": "text", "text": "What is it?"}])
"""Questions that a usable template can render, at least the second."""

_TAG = r"</?[\w|-]+>|\[/?[A-Z]+\]"
_INSERTED = re.compile(rf"\s+|{_TAG}")
"""A piece of what templates insert before an answer: blanks, <think>, </think>, [THINK]."""
_OPENED = re.compile(rf"(?:\s|{_TAG})*\Z")  # a blank at a time: n in a row as \s+ can be cut in 2^(n-1) ways
END_OF_THINKING = "</think>"
_HALF_A_TAG = re.compile(r"(?:<[\w|/-]*)?\Z")


class ChatTemplate:
    """The chat template of one processor. Picklable."""

    def __init__(self, processor: Any):
        self.processor = processor
        added = processor.tokenizer.added_tokens_decoder.values()
        named = set(processor.tokenizer.all_special_tokens) | {str(token) for token in added if token.special}
        self._control_tokens = sorted(named, key=len, reverse=True)

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The chat as text; with prompt=True, followed by the generation prompt.

        Raises SampleError where the template refuses the chat.
        """
        with as_sample_error("the chat template"):
            return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    def writes_bos(self, text: str) -> bool:
        """Whether a rendered chat begins with the BOS token, which the tokenizer then must not add once more."""
        bos = self.processor.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def fingerprint_of_bos(self, name: str = "bos") -> dict[str, str]:
        """For the identity of what is made with this template, {name: how many BOS tokens}; mostly {}.

        Not empty where the template writes BOS and the tokenizer adds it: chats had two before, and what was made of
        such chats must be refused.
        """
        tokenizer = self.processor.tokenizer
        for question in PROBES:
            with suppress(SampleError):
                text = self.render([{"role": "user", "content": question}], prompt=True)
                twice = self.writes_bos(text) and tokenizer(text).input_ids[:2] == 2 * [tokenizer.bos_token_id]
                return {name: "one (earlier versions: two)"} if twice else {}
        return {}

    def check(self) -> None:
        """Raise RecipeError, with the reason, where not even the simplest chats can be used."""
        for question in PROBES:
            chat = [{"role": "user", "content": question}, turn("A cat.")]
            try:
                self.response_spans(self.render(chat), chat)
                return
            except SampleError as error:
                reason = str(error)
        raise RecipeError(f"no chat can be used with this chat template, not even a question and an answer: {reason}")

    def end_of_turn(self) -> str:
        """The token that ends an assistant turn, with which the student learns to stop."""
        chat = [{"role": "user", "content": PROBES[-1]}, turn("A cat.")]
        text = self.render(chat)
        ((_, end),) = self.response_spans(text, chat)
        return next(token for token in self._control_tokens if text[:end].endswith(token))

    def thinks(self) -> bool:
        """Whether it opens a thinking block in its generation prompt, or inserts one before an answer."""
        for question in PROBES:
            chat = [{"role": "user", "content": question}, turn("A cat.")]
            with suppress(SampleError):
                text = self.render(chat[:1], prompt=True) + self.render(chat)
                return "<think>" in text or END_OF_THINKING in text
        return False

    def answer_in(self, generated: str) -> str:
        """The answer in a text that a model has generated: of a template that thinks, what follows the last block.

        That is a part of the response, so the student has learnt to generate it too.
        """
        return after_thinking(generated) if END_OF_THINKING in generated and self.thinks() else generated

    def refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        """Raise SampleError where the text of a chat contains one of the tokenizer's control tokens."""
        for message in messages:
            text = text_of(message)
            for token in self._control_tokens:
                if token in text:
                    raise SampleError(f"the text contains the tokenizer's control token {token}")

    def response_spans(self, text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """[(first character, last character + 1)] of each response in the rendered chat.

        Raises SampleError where the template changes an answer, or what stands before it, or ends no turn.
        """
        return list(self.spans_by_turn(text, messages).values())

    def spans_by_turn(self, text: str, messages: Sequence[Message]) -> dict[int, tuple[int, int]]:
        """The same spans, by the number of the assistant turn's message, from 0."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans = {index: self._response_span(text, messages[: index + 1]) for index in turns}
        return {index: span for index, span in spans.items() if span is not None}

    def _response_span(self, text: str, messages: Sequence[Message]) -> tuple[int, int] | None:
        """That of the last of `messages`; None where the template has removed the reasoning from it."""
        turn, answer = len(messages) - 1, text_of(messages[-1]).strip()
        if not answer:
            raise SampleError(f"assistant turn {turn} is empty")
        if not turn:
            raise SampleError("the chat begins with an assistant turn, which answers nothing")
        before = self._length_before(text, messages)
        found = _find(text, before, answer)
        if found is not None:
            return found[0], self._end_of_turn(text, found[1])
        alone = self.render(messages)
        rest = text[before : self._next_control_token(text, before)]
        if _find(alone, self._length_before(alone, messages), answer) is None or not _ends_with(answer, rest):
            raise SampleError(
                f"the chat template changes the answer of turn {turn}: expected {answer[:40]!r}, found {rest[:40]!r}"
            )
        return None

    def _length_before(self, text: str, messages: Sequence[Message]) -> int:
        """Characters of `text` up to where the model would begin to generate the last of `messages`."""
        prompt = self.render(messages[:-1], prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        common = commonprefix([text, prompt])  # noqa: RUF071  # characters are what is wanted
        common = common[: len(common) - len(_HALF_A_TAG.search(common)[0])]  # type: ignore[index]  # it always matches
        if not common.startswith(self.render(messages[:-1])):
            raise SampleError(f"the chat template changes what stands before turn {len(messages) - 1}")
        return len(common)

    def _end_of_turn(self, text: str, end: int) -> int:
        after = end + len(text[end:]) - len(text[end:].lstrip())
        for token in self._control_tokens:
            if text.startswith(token, after):
                return after + len(token)
        raise SampleError(
            "the chat template writes no end-of-turn token after the answer, so the student could not learn to stop: "
            f"found {text[end : end + 20]!r}; expected one of the tokenizer's special tokens"
        )

    def _next_control_token(self, text: str, begin: int) -> int:
        places = (text.find(token, begin) for token in self._control_tokens)
        return min((place for place in places if place >= 0), default=len(text))


def text_of(message: Message) -> str:
    """The text of a message, without its images."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def after_thinking(text: str) -> str:
    """What follows the last thinking block of a text; all of it where it has none."""
    return text.rpartition(END_OF_THINKING)[2].strip()


def turn(answer: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def _find(text: str, begin: int, answer: str) -> tuple[int, int] | None:
    """Where the response begins and the answer ends, for a model that generates from `begin` on; None if not there.

    The answer may begin inside the generation prompt, where that opens the thinking block that the answer opens too.
    """
    place, tags = begin - len(_OPENED.search(text[max(0, begin - 200) : begin])[0]), False  # type: ignore[index]
    while True:
        end = _match(text, place, answer)
        if end is not None and end > begin:
            first = place + len(text[place:]) - len(text[place:].lstrip())
            return (begin if tags or first < begin else first), end
        piece = _INSERTED.match(text, place)
        if piece is None:
            return None
        place = piece.end()
        tags = tags or (place > begin and not piece[0].isspace())


def _match(text: str, place: int, answer: str) -> int | None:
    """Where `answer` ends if it stands at `place`, whatever the blanks: templates set the lines of reasoning anew."""
    if text.startswith(answer, place):
        return place + len(answer)
    for char in answer:
        if char.isspace():
            continue
        while place < len(text) and text[place].isspace():
            place += 1
        if not text.startswith(char, place):
            return None
        place += 1
    return place


def _ends_with(answer: str, rest: str) -> bool:
    squeezed = "".join(rest.split())
    return bool(squeezed) and "".join(answer.split()).endswith(squeezed)
