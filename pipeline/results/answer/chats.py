"""Let a model answer all assistant turns of a batch of chats, each turn after its own earlier answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from data_prep.shards import RawSample
from pipeline.errors import SampleError
from pipeline.results.evaluate.answers import images_of
from pipeline.results.generate import Generated, Vlm, greedy_with_log_probs, pad_left, unwritable_ids
from pipeline.vlm.chat_template import text_of


class Answerer:
    """Answers chats greedily with one model."""

    def __init__(self, vlm: Vlm, max_new_tokens: int):
        self.vlm, self.max_new_tokens = vlm, max_new_tokens
        self._banned_ids = unwritable_ids(vlm)

    def __call__(self, samples: Sequence[RawSample]) -> list[dict[str, Any] | SampleError]:
        """Each sample's record with the model's answers, or why it has none.

        The samples are one batch: turn 1 of all, then turn 2 of those that have one, and so on.
        """
        chats = [_Chat(sample) for sample in samples]
        for chat in chats:
            with chat.rejecting():
                chat.check(self.vlm)
        while open_chats := [chat for chat in chats if chat.is_open]:
            self._answer_next_turn(open_chats)
        for chat in chats:
            with chat.rejecting():
                chat.check_usable(self.vlm)
        return [chat.error or chat.record() for chat in chats]

    def _answer_next_turn(self, chats: Sequence[_Chat]) -> None:
        asked: list[tuple[_Chat, Mapping[str, Tensor]]] = []
        for chat in chats:
            with chat.rejecting():
                before = chat.messages[: chat.turn]
                asked.append((chat, self.vlm.encode_question(before, images_of(before, chat.sample.images))))
        if not asked:
            return
        inputs = pad_left([prompt for _, prompt in asked], self.vlm.encoder.filler(), self.vlm.pad_id)
        answers = greedy_with_log_probs(self.vlm, inputs, self.max_new_tokens, self._banned_ids)
        for (chat, _), answer in zip(asked, answers, strict=True):
            with chat.rejecting():
                chat.take(answer, self._text(answer))

    def _text(self, answer: Generated) -> str:
        """The answer as text. Raises SampleError where it cannot stand in a chat."""
        if not math.isfinite(answer.log_prob):
            raise SampleError("the model's outputs are not finite")
        if not answer.ended:
            raise SampleError(f"answer not finished within --max-new-tokens {self.max_new_tokens} tokens")
        # Not decode_text, which drops control tokens: training would refuse them, and silence is no answer.
        template = self.vlm.encoder.template
        text = template.answer_in(self.vlm.tokenizer.decode(answer.ids[:-1], skip_special_tokens=False).strip())
        if not text:
            raise SampleError("empty answer")
        try:
            template.refuse_control_tokens([{"role": "assistant", "content": text}])
        except SampleError as error:
            raise SampleError(f"unusable answer: {error}") from None
        return text


class _Chat:
    """A sample, and how far its assistant turns are answered."""

    def __init__(self, sample: RawSample):
        self.sample = sample
        self.messages: list[Mapping[str, Any]] = list(sample.record["messages"])
        self.answered: list[dict[str, Any]] = []
        self.error: SampleError | None = None
        """Why the sample is rejected."""
        self._turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def is_open(self) -> bool:
        """Whether an assistant turn is still to be answered."""
        return self.error is None and len(self.answered) < len(self._turns)

    @property
    def turn(self) -> int:
        """Index of the next assistant turn."""
        return self._turns[len(self.answered)]

    @contextmanager
    def rejecting(self) -> Iterator[None]:
        """A SampleError that is raised inside rejects the sample. The first one is kept."""
        try:
            yield
        except SampleError as error:
            self.error = self.error or error

    def check(self, vlm: Vlm) -> None:
        """Raise SampleError where the questions could not be asked, before anything is generated."""
        if not self._turns:
            raise SampleError("no assistant turn")
        if self._turns[0] == 0:
            raise SampleError("the chat begins with an assistant turn, which answers nothing")
        asked = [message for message in self.messages if message["role"] != "assistant"]
        vlm.encoder.template.refuse_control_tokens(asked)

    def take(self, answer: Generated, text: str) -> None:
        """Put the answer in the place of the next assistant turn's text."""
        given = text_of(self.messages[self.turn])
        self.messages[self.turn] = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        self.answered.append({"given": given, "log_prob": answer.log_prob, "tokens": len(answer.ids)})

    def check_usable(self, vlm: Vlm) -> None:
        """Raise SampleError where this model could not be trained on the chat with its answers."""
        if self.error is None:
            vlm.encoder(self.sample.key, self.messages, self.sample.images)

    def record(self) -> dict[str, Any]:
        """The sample's record with the answers."""
        return {**self.sample.record, "messages": self.messages, "answered": self.answered}


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as the shard holds it."""
    return json.dumps(record, ensure_ascii=False).encode()
