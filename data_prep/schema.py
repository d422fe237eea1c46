"""What a sample is, and what makes one bad.

A sample on disk is `KEY.json` and its images `KEY.0.png`, `KEY.1.jpg`, ..., numbered in the order in which the chat's
{"type": "image"} parts stand, over all turns. The JSON is

    {"id": "...", "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                               {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
     "question_type": "...",                                  (only where the source has types)
     "answered": [{"given": "A dog.", "log_prob": -0.7, "tokens": 4}],    (only where a model gave the answers)
     "provenance": {"source": "llava", "file": "chat.json", "index": 7, ...}}

and `messages` is what `processor.apply_chat_template` takes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SCHEMA_VERSION = 1
"""Version of the sample and of `manifest.json`; readers refuse a newer one."""

ROLES = ("system", "user", "assistant")

SPLITS = ("train", "held_out")
"""The two shard folders of an output folder."""

REASONS = {
    "bad_json": "the line is not JSON",
    "bad_utf8": "the text is not UTF-8",
    "wrong_type": "a field is missing or is not what it should be",
    "missing_image": "an image file is not there",
    "image_path_escapes": "an image path leads out of the images folder",
    "broken_image": "an image cannot be decoded to its last pixel",
    "image_too_large": "an image has more pixels than is safe to decode",
    "more_placeholders_than_images": "the text asks for more images than there are",
    "fewer_placeholders_than_images": "there are images that the text never mentions",
    "conflicting_image": "an image part and the record name different pictures",
    "conflicting_system": "the record and the chat have different system prompts",
    "video_or_audio": "the record is about a video or a sound, which nobody would see or hear",
    "unused_field": "a field that decides what the chat means would be lost",
    "image_in_response": "an assistant turn holds an image",
    "no_assistant_turn": "nobody answers",
    "empty_response": "an assistant turn has no words",
    "empty_turn": "a user turn has neither words nor images",
    "duplicate_id": "an earlier record has this id",
}
"""Reason code, as in rejects.jsonl -> what it means."""

_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def parse_json(content: str | bytes) -> Any:
    """json.loads, but JSON that is nested too deeply is a ValueError too, as all JSON that cannot be read."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class DataError(Exception):
    """The run cannot go on, but the user can put it right. The message: what was expected, what found, what to do."""


class ChangedSample(DataError):
    """A sample's bytes are not those that were written: a disk or a copy has flipped some. The others are whole."""


class BadSample(Exception):
    """One record cannot be used. It is recorded with its reason (a key of REASONS) and detail, and left out."""

    def __init__(self, reason: str, detail: str):
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
        self.id: Any = None
        """The record's id where that is known: see `tag_with_id`."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@contextmanager
def tag_with_id(sample_id: Any) -> Iterator[None]:
    """A BadSample that is raised inside gets this id."""
    try:
        yield
    except BadSample as bad:
        bad.id = sample_id
        raise


def validate_record(record: Any, images: Sequence[bytes]) -> None:
    """Check a sample's JSON, and that it has as many image parts as there are images (bytes of image files, undecoded).

    Raises BadSample with a reason of REASONS. Whether the images decode is `images.check_image`'s question.
    """
    if not isinstance(record, dict):
        raise BadSample("wrong_type", f"the sample is {type_name(record)}; expected an object")
    if not isinstance(record.get("id"), str) or not record["id"]:
        raise BadSample("wrong_type", f"id is {record.get('id')!r}; expected a string that is not empty")
    if not isinstance(record.get("provenance"), dict):
        raise BadSample("wrong_type", f"provenance is {type_name(record.get('provenance'))}; expected an object")
    if not isinstance(record.get("question_type", ""), str):
        raise BadSample("wrong_type", f"question_type is {type_name(record['question_type'])}; expected a string")
    validate_messages(record.get("messages"), len(images))


def validate_messages(messages: Any, images: int) -> None:
    """Check a chat that comes with that many images. Raises BadSample with a reason of REASONS."""
    if not isinstance(messages, list) or not messages:
        raise BadSample("wrong_type", f"messages is {type_name(messages)}; expected a list of turns that is not empty")
    parts = sum(_validate_turn(number, turn) for number, turn in enumerate(messages))
    if not any(turn["role"] == "assistant" for turn in messages):
        raise BadSample("no_assistant_turn", f"{len(messages)} turns: " + ", ".join(turn["role"] for turn in messages))
    if parts > images:
        raise BadSample("more_placeholders_than_images", f"{parts} placeholders, {images} images")
    if parts < images:
        raise BadSample("fewer_placeholders_than_images", f"{parts} placeholders, {images} images")


def key_for(sample_id: str) -> str:
    """A sample's key: its id where that is safe as a file name, else a readable part of it and a hash.

    Keys have letters, digits, - and _ only (WebDataset ends a key at the first dot), at most 64 of them, and differ
    where ids differ.
    """
    if _SAFE_KEY.fullmatch(sample_id):
        return sample_id
    readable = re.sub(r"[^A-Za-z0-9]+", "-", sample_id).strip("-")[:40]
    return f"{readable or 'id'}-{hashlib.sha256(sample_id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _validate_turn(number: int, turn: Any) -> int:
    """Check one turn; returns how many image parts it has."""
    if not isinstance(turn, dict):
        raise BadSample("wrong_type", f"turn {number} is {type_name(turn)}; expected an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise BadSample("wrong_type", f"turn {number} has role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, list):
        raise BadSample("wrong_type", f"turn {number} has content {type_name(content)}; expected a list of parts")
    images = sum(_validate_part(number, part) for part in content)
    if role == "assistant":
        if images:
            raise BadSample("image_in_response", f"turn {number} is the assistant's and holds {images} images")
        if not any(part["text"].strip() for part in content):
            raise BadSample("empty_response", f"turn {number} has no words")
    elif not content:
        raise BadSample("empty_turn", f"turn {number} ({role}) has no parts")
    return images


def _validate_part(number: int, part: Any) -> bool:
    """Check one part of a turn; returns whether it is an image."""
    if isinstance(part, dict) and part == {"type": "image"}:
        return True
    if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
        raise BadSample("wrong_type", f"turn {number} has a part that is neither image nor text: {str(part)[:80]}")
    if not isinstance(part["text"], str):
        raise BadSample("wrong_type", f"turn {number} has text {type_name(part['text'])}; expected a string")
    return False


def type_name(value: Any) -> str:
    """What a message calls a value of the wrong type."""
    return "missing" if value is None else f"a {type(value).__name__}"
