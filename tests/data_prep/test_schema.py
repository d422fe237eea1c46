from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.schema import BadSample, key_for, tag_with_id, validate_record

GOOD: dict[str, Any] = {
    "id": "a",
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
    "provenance": {"source": "test", "index": 0},
}


def reason(record: Any, images: int = 1) -> str:
    with pytest.raises(BadSample) as caught:
        validate_record(record, [b""] * images)
    return caught.value.reason


def test_a_good_record_passes_and_stays_as_it_is() -> None:
    before = copy.deepcopy(GOOD)
    validate_record(GOOD, [b""])
    validate_record({**GOOD, "question_type": "shape"}, [b""])
    assert before == GOOD


def test_fields_of_the_wrong_type() -> None:
    assert reason("a") == "wrong_type"
    for change in (
        {"id": ""},
        {"id": 3},
        {"provenance": None},
        {"question_type": 3},
        {"messages": {}},
        {"messages": []},
    ):
        assert reason({**GOOD, **change}) == "wrong_type"


@pytest.mark.parametrize(
    "content",
    [
        "text",
        [{"type": "video"}],
        [{"type": "text"}],
        [{"type": "text", "text": 3}],
        [{"type": "image", "image": "x"}],
        [3],
    ],
)
def test_parts_are_text_or_images(content: Any) -> None:
    assert reason({**GOOD, "messages": [{"role": "user", "content": content}, GOOD["messages"][1]]}) == "wrong_type"


def test_turns_are_complete() -> None:
    user, assistant = GOOD["messages"]
    assert reason({**GOOD, "messages": [user]}) == "no_assistant_turn"
    assert reason({**GOOD, "messages": [user, {**assistant, "content": []}]}) == "empty_response"
    assert (
        reason({**GOOD, "messages": [user, {"role": "assistant", "content": user["content"]}]}) == "image_in_response"
    )
    assert reason({**GOOD, "messages": [{"role": "user", "content": []}, assistant]}) == "empty_turn"
    assert reason({**GOOD, "messages": [{"role": "narrator", "content": []}, assistant]}) == "wrong_type"
    assert reason(GOOD, images=0) == "more_placeholders_than_images"
    assert reason(GOOD, images=2) == "fewer_placeholders_than_images"


def test_a_bad_sample_knows_its_record_and_travels() -> None:
    with pytest.raises(BadSample, match="missing_image: a.png") as caught, tag_with_id(7):
        raise BadSample("missing_image", "a.png")
    assert caught.value.id == 7
    copy = pickle.loads(pickle.dumps(BadSample("missing_image", "a.png")))
    assert (copy.reason, copy.detail) == ("missing_image", "a.png")


def test_ids_that_are_safe_are_keys_as_they_are() -> None:
    assert key_for("000000033471") == "000000033471"
    assert key_for("GQA_1-2") == "GQA_1-2"
    assert re.fullmatch(r"coco-train-1-jpg-[0-9a-f]{16}", key_for("coco/train/1.jpg"))


@given(st.text(min_size=1), st.text(min_size=1))
def test_keys_are_safe_and_differ_where_ids_do(one: str, other: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", key_for(one))
    assert (key_for(one) == key_for(other)) == (one == other)
