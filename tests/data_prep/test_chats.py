from __future__ import annotations

from typing import Any

import pytest

from data_prep.chats import read_chat
from data_prep.schema import BadSample

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def messages(turns: Any) -> list[dict[str, Any]]:
    return read_chat(turns).messages


def parts(value: Any) -> Any:
    return messages([{"from": "human", "value": value}])[0]["content"]


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
    assert messages(llava) == messages(openai) == messages(in_parts)
    assert [message["role"] for message in messages(llava)] == ["system", "user", "assistant", "user", "assistant"]


def test_fields_that_arrow_filled_in_are_left_out() -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?", "index": None}]
    assert messages([{"role": "user", "content": content}])[0]["content"] == [IMAGE, text("What?")]


def test_a_system_turn_without_words_is_left_out() -> None:
    assert messages([{"from": "system", "value": ""}, {"from": "gpt", "value": "Hi."}])[0]["role"] == "assistant"


@pytest.mark.parametrize(
    "turns, message",
    [
        (None, "the chat is missing"),
        ({"from": "human"}, "the chat is a dict"),
        ([3], "turn 0 is a int"),
        ([{"value": "What?"}], "turn 0 is by None; expected one of human, user"),
        ([{"from": "human"}], "turn 0 says missing; expected text"),
        ([{"role": "user", "content": [{"type": "picture"}]}], "neither image nor text"),
        ([{"role": "user", "content": ["What?"]}], "neither image nor text"),
    ],
)
def test_anything_else_is_of_the_wrong_type(turns: Any, message: str) -> None:
    with pytest.raises(BadSample, match=f"wrong_type: .*{message}"):
        messages(turns)


@pytest.mark.parametrize(
    "part, named",
    [
        ({"type": "image"}, None),
        ({"type": "image", "image": "b.png"}, "b.png"),
        ({"image": "b.png"}, "b.png"),
        ({"type": "image", "image": None, "path": "b.png", "text": None}, "b.png"),
        ({"type": "image", "image": "b.png", "max_pixels": 1000}, "b.png"),
        ({"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}}, {"url": "b.png", "detail": "low"}),
        ({"type": "image_url", "image_url": "b.png"}, "b.png"),
        ({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
        ({"type": "image", "bytes": b"png"}, b"png"),
        ({"type": "image", "base64": "AAAA"}, {"base64": "AAAA"}),
        ({"type": "image", "source": {"type": "base64", "data": "AAAA"}}, {"type": "base64", "data": "AAAA"}),
    ],
)
def test_a_part_names_its_own_picture(part: dict[str, Any], named: Any) -> None:
    chat = read_chat([{"role": "user", "content": [{"type": "text", "text": "Is <image> this?"}, part]}])
    assert chat.messages == [{"role": "user", "content": [text("Is"), IMAGE, text("this?"), IMAGE]}]
    assert chat.pictures == [None, named]


@pytest.mark.parametrize(
    "part, reason",
    [
        ({"type": "video"}, "video_or_audio"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "video_or_audio"),
        ({"video": "a.mp4"}, "video_or_audio"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "video_or_audio"),
        ({"type": "image", "image": "a.png", "path": "b.png"}, "conflicting_image"),
        ({"type": "text", "text": "What?", "image": "b.png"}, "conflicting_image"),
        ({"type": "image", "file": "b.png"}, "wrong_type: .*image part with 'file': b.png"),
        ({"type": "image", "text": "A cat."}, "wrong_type: .*image part with 'text'"),
    ],
)
def test_a_part_that_nobody_would_see_is_bad(part: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        read_chat([{"role": "user", "content": [part]}])


def test_a_system_prompt_becomes_the_first_turn() -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    system = {"role": "system", "content": [text("Be brief.")]}
    assert read_chat(turns, "Be brief.").messages == [system, *messages(turns)]
    same = [{"from": "system", "value": "Be brief."}, *turns]
    assert read_chat(same, "Be brief.").messages == [system, *messages(turns)]
    assert read_chat(turns, " ").messages == read_chat(turns, None).messages == messages(turns)
    with pytest.raises(BadSample, match="conflicting_system"):
        read_chat([{"from": "system", "value": "Be long."}, *turns], "Be brief.")
