"""Chats as people store them -> chats as `processor.apply_chat_template` takes them.

Two forms are read: LLaVA/ShareGPT turns, {"from": "human", "value": "<image>\\nWhat?"}, and OpenAI/Hugging Face turns,
{"role": "user", "content": "..." or a list of parts}. A `<image>` in running text becomes an image part in its place.
"""

from __future__ import annotations

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


def to_messages(turns: Any) -> list[dict[str, Any]]:
    """Convert a list of turns in either form. Raises BadSample (wrong_type) for anything else.

    System turns without words, as ShareGPT files often have, are left out. Whether the chat is complete and its
    images are there is for schema.validate_messages to say.
    """
    if not isinstance(turns, list):
        raise BadSample("wrong_type", f"the chat is {type_name(turns)}; expected a list of turns")
    messages = [_message(number, turn) for number, turn in enumerate(turns)]
    return [message for message in messages if message["content"] or message["role"] != "system"]


def _message(number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadSample("wrong_type", f"turn {number} is {type_name(turn)}; expected an object")
    name = turn.get("from") or turn.get("role")
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise BadSample("wrong_type", f"turn {number} is by {name!r}; expected one of {', '.join(ROLE_NAMES)}")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if isinstance(content, str):
        return {"role": ROLE_NAMES[name], "content": _split_text(content)}
    if not isinstance(content, list):
        raise BadSample("wrong_type", f"turn {number} says {type_name(content)}; expected text or a list of parts")
    return {"role": ROLE_NAMES[name], "content": [part for item in content for part in _part(number, item)]}


def _split_text(text: str) -> list[dict[str, str]]:
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
    return parts


def _part(number: int, item: Any) -> list[dict[str, str]]:
    """One part of a list: Arrow fills the fields that other parts have with None, and those are left out."""
    fields = {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else {}
    if fields.get("type") == "image":
        return [{"type": "image"}]
    if fields.get("type") == "text" and isinstance(fields.get("text"), str):
        return [{"type": "text", "text": fields["text"]}] if fields["text"] else []
    raise BadSample("wrong_type", f"turn {number} has a part that is neither image nor text: {str(item)[:80]}")
