"""Chats as people store them -> messages as `processor.apply_chat_template` takes them, and their pictures in order.

Two forms of turns are read: LLaVA/ShareGPT, {"from": "human", "value": "<image>\\nWhat?"}, and OpenAI/Hugging Face,
{"role": "user", "content": "..." or a list of parts}. A `<image>` in a text becomes an image part in its place. A part
may name its own picture: {"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "..."}}, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.schema import BadSample, type_name

PLACEHOLDER = "<image>"

ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""A turn's `from` or `role` -> its role."""

TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")
OTHER_MEDIA = ("video", "audio")
"""A part whose type starts or ends like this cannot be used."""
IMAGE_FIELDS = ("image", "image_url", "url", "path", "bytes", "base64", "data", "source")
"""Fields of an image part, or of an object in their place, that hold its picture."""
IGNORED_FIELDS = ("type", "text", "index", "id", "detail", "cache_control", "media_type", "mime_type")
"""Other fields that an image part may have; of these, `text` must be empty."""
UNUSED_FIELDS = (
    "image", "images", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking",
)  # fmt: skip
"""Fields of a turn without which it means something else, and for which messages have no place."""
TRAINED_FIELDS = ("loss", "train", "weight")
"""Fields of an assistant's turn that say whether it is trained on; a sample has no place for a no."""
SIZE_FIELDS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Fields of Qwen's image parts; the recipe decides the size here."""


@dataclass(frozen=True)
class Chat:
    """A chat, and where its pictures are."""

    messages: list[dict[str, Any]]
    """As data_prep.schema describes them."""
    pictures: list[Any]
    """For each image part, over all turns: the picture that the part itself names, or None."""


def read_chat(turns: Any, system: str | None = None) -> Chat:
    """Convert a list of turns in either form; `system`, if any, becomes the first turn.

    System turns without words, as ShareGPT files often have, are left out. Whether the chat is complete is for
    schema.validate_messages to say.

    Raises BadSample: wrong_type, video_or_audio, unused_field, conflicting_image, conflicting_system.
    """
    if not isinstance(turns, list):
        raise BadSample("wrong_type", f"the chat is {type_name(turns)}; expected a list of turns")
    converted = [_message(number, turn) for number, turn in enumerate(turns)]
    converted = [turn for turn in converted if turn.messages[0]["content"] or turn.messages[0]["role"] != "system"]
    if system is not None and system.strip():
        converted = _with_system(system, converted)
    return Chat(
        [message for turn in converted for message in turn.messages], [p for c in converted for p in c.pictures]
    )


def _with_system(system: str, turns: list[Chat]) -> list[Chat]:
    first = _message(0, {"role": "system", "content": system})
    for turn in turns:
        if turn.messages[0]["role"] == "system" and turn != first:
            raise BadSample("conflicting_system", "the record has a system prompt, and the chat has another")
    return [first, *(turn for turn in turns if turn != first)]


def _message(number: int, turn: Any) -> Chat:
    if not isinstance(turn, dict):
        raise BadSample("wrong_type", f"turn {number} is {type_name(turn)}; expected an object")
    name = turn.get("from") or turn.get("role")
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise BadSample("wrong_type", f"turn {number} is by {name!r}; expected one of {', '.join(ROLE_NAMES)}")
    _refuse_unused(number, turn, ROLE_NAMES[name])
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample("wrong_type", f"turn {number} says {type_name(content)}; expected text or a list of parts")
    parts, pictures = [], []
    for item in content:
        found = _part(number, item)
        parts += found.messages
        pictures += found.pictures
    return Chat([{"role": ROLE_NAMES[name], "content": parts}], pictures)


def _refuse_unused(number: int, turn: dict[str, Any], role: str) -> None:
    """Raise BadSample where a turn has what its message could not hold."""
    if media := [name for name in turn if name.rstrip("s") in OTHER_MEDIA and not is_empty(turn[name])]:
        raise BadSample("video_or_audio", f"turn {number} has {media[0]!r}: only text and images are used")
    if unused := [name for name in UNUSED_FIELDS if not is_empty(turn.get(name))]:
        raise BadSample("unused_field", f"turn {number} has {unused[0]!r}, which a sample cannot hold")
    untrained = [name for name in TRAINED_FIELDS if turn.get(name) is not None and not turn[name]]
    if untrained and role == "assistant":
        name = untrained[0]
        raise BadSample("unused_field", f"turn {number} has {name} {turn[name]!r}: all answers are trained on")


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, "", false, or lists and objects of nothing, as Arrow fills them."""
    if isinstance(value, (list, dict)):
        return all(is_empty(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return value is None or value is False or value == ""


def _split_text(text: str) -> Chat:
    """Put an image part where each placeholder stands; blanks beside a placeholder belong to it."""
    pieces = text.split(PLACEHOLDER)
    parts: list[dict[str, str]] = []
    for place, piece in enumerate(pieces):
        if place > 0:
            parts.append({"type": "image"})
            piece = piece.lstrip()
        if place < len(pieces) - 1:
            piece = piece.rstrip()
        if piece:
            parts.append({"type": "text", "text": piece})
    return Chat(parts, [None] * (len(pieces) - 1))


def _part(number: int, item: Any) -> Chat:
    """The parts that one part of a list becomes. Arrow fills the fields that other parts have with None."""
    fields = {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else {}
    kind = fields.get("type") or _kind_of(fields)
    if isinstance(kind, str) and any(kind.startswith(media) or kind.endswith(media) for media in OTHER_MEDIA):
        raise BadSample("video_or_audio", f"turn {number} has a part of type {kind!r}: only text and images are used")
    if kind in TEXT_TYPES and not all(is_empty(fields.get(name)) for name in ("image", "image_url")):
        raise BadSample("conflicting_image", f"turn {number} has a text part that names a picture: {str(item)[:80]}")
    if kind in TEXT_TYPES and isinstance(fields.get("text"), str):
        return _split_text(fields["text"])
    if kind in IMAGE_TYPES:
        return _image_part(number, fields)
    raise BadSample("wrong_type", f"turn {number} has a part that is neither image nor text: {str(item)[:80]}")


def _kind_of(fields: dict[str, Any]) -> str | None:
    """The type of a part without one, such as Qwen's {"image": "a.png"}."""
    kinds = [name for name in ("text", "image", *OTHER_MEDIA) if name in fields]
    return kinds[0] if len(kinds) == 1 else None


def _image_part(number: int, fields: dict[str, Any]) -> Chat:
    unknown = set(fields) - {*IMAGE_FIELDS, *IGNORED_FIELDS, *SIZE_FIELDS}
    if unknown or fields.get("text"):
        name = min(unknown) if unknown else "text"
        raise BadSample("wrong_type", f"turn {number} has an image part with {name!r}: {str(fields[name])[:80]}")
    named = [
        {name: fields[name]} if name in ("base64", "data") else fields[name]  # bare text would be taken for a path
        for name in IMAGE_FIELDS
        if not is_empty(fields.get(name))
    ]
    if len(named) > 1:
        raise BadSample("conflicting_image", f"turn {number} has an image part that names {len(named)} pictures")
    return Chat([{"type": "image"}], named or [None])
