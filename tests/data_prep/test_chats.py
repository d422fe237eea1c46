from __future__ import annotations

from typing import Any

import pytest

from data_prep.chats import to_messages
from data_prep.schema import BadSample

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def parts(value: Any) -> Any:
    return to_messages([{"from": "human", "value": value}])[0]["content"]


@pytest.mark.parametrize(
    "value, expected",
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("What?", [text("What?")]),
        (" two  blanks ", [text(" two  blanks ")]),
        ("<image> <image>", [IMAGE, IMAGE]),
        ("Look at <image> and <image>, then say", [text("Look at"), IMAGE, text("and"), IMAGE, text(", then say")]),
        ("", []),
    ],
)
def test_an_image_stands_where_its_placeholder_stood(value: str, expected: list[dict[str, str]]) -> None:
    assert parts(value) == expected


def test_both_forms_give_the_same_chat() -> None:
    llava = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    openai = [{"role": names[turn["from"]], "content": turn["value"]} for turn in llava]
    in_parts = [{"role": turn["role"], "content": parts(turn["content"])} for turn in openai]
    assert to_messages(llava) == to_messages(openai) == to_messages(in_parts)
    assert [message["role"] for message in to_messages(llava)] == ["system", "user", "assistant", "user", "assistant"]


def test_fields_that_arrow_filled_in_are_left_out() -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?", "index": None}]
    assert to_messages([{"role": "user", "content": content}])[0]["content"] == [IMAGE, text("What?")]


def test_a_system_turn_without_words_is_left_out() -> None:
    assert to_messages([{"from": "system", "value": ""}, {"from": "gpt", "value": "Hi."}])[0]["role"] == "assistant"


@pytest.mark.parametrize(
    "turns, message",
    [
        (None, "the chat is missing"),
        ({"from": "human"}, "the chat is a dict"),
        ([3], "turn 0 is a int"),
        ([{"value": "What?"}], "turn 0 is by None; expected one of human, user"),
        ([{"from": "human"}], "turn 0 says missing; expected text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "neither image nor text"),
        ([{"role": "user", "content": ["What?"]}], "neither image nor text"),
    ],
)
def test_anything_else_is_of_the_wrong_type(turns: Any, message: str) -> None:
    with pytest.raises(BadSample, match=f"wrong_type: .*{message}"):
        to_messages(turns)
