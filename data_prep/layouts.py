"""The fields of a record, in the layouts that people use -> a Sample.

Chats: `conversations` or `messages`, turns as data_prep.chats reads them (LLaVA, ShareGPT4V, OpenAI, ms-swift); `texts`
of {"user": ..., "assistant": ...} (the Cauldron); `prompt` and `completion` (TRL); `query`, `response` and `history`
(ms-swift). Pictures: `image` or `images`, and `file_name` or `file_names` of image folders. System prompts: `system`,
`system_prompt`. Of several names for one thing, the first that is not null counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_prep.chats import PLACEHOLDER, Chat, is_empty, read_chat
from data_prep.images import image_bytes
from data_prep.schema import BadSample, tag_with_id, type_name
from data_prep.sources import Sample

SYSTEM = ("system", "system_prompt", "system_message")
PICTURES = ("image", "images", "file_name", "file_names")
OTHER_MEDIA = ("video", "videos", "video_path", "video_url", "audio", "audios", "audio_path", "audio_url")
"""Fields of which one that is not empty makes a record unusable."""


def read_sample(record: Any, folder: Path) -> Sample:
    """Convert a record; `folder` is where paths of images start.

    Raises BadSample: wrong_type, video_or_audio, unused_field, conflicting_system, conflicting_image; and what
    images.image_bytes raises.
    """
    if isinstance(record, BadSample):
        raise record
    if not isinstance(record, dict):
        raise BadSample("wrong_type", f"the record is {type_name(record)}; expected an object")
    with tag_with_id(record.get("id")):
        if media := [name for name in OTHER_MEDIA if not is_empty(record.get(name))]:
            raise BadSample("video_or_audio", f"the record has {media[0]!r}: only text and images are used")
        if record.get("tools"):
            raise BadSample("unused_field", "the record has 'tools', which a sample cannot hold")
        own = _own_pictures(record)
        chat = _read_chat(record, bool(own))
        return Sample(
            chat.messages,
            _merge(chat.pictures, own, folder),
            id=record.get("id"),
            provenance=_named(own or [picture for picture in chat.pictures if picture is not None]),
        )


def has_chat(fields: Iterable[str]) -> bool:
    """Whether a record with these fields has one of the layouts."""
    return any(set(needed) <= set(fields) for needed, _ in LAYOUTS)


def _read_chat(record: dict[str, Any], pictures: bool) -> Chat:
    system = _first(record, SYSTEM)
    if system is not None and not isinstance(system, str):
        raise BadSample("wrong_type", f"the system prompt is {type_name(system)}; expected text")
    for needed, turns_of in LAYOUTS:
        if all(record.get(field) is not None for field in needed):
            return read_chat(turns_of(record, pictures), system)
    return read_chat(None, system)


def _texts(record: dict[str, Any], pictures: bool) -> Any:
    """The Cauldron's question and answer pairs, which say nothing of where the pictures stand: before the first."""
    texts = record["texts"]
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        raise BadSample(
            "wrong_type", f"texts is {type_name(texts)}; expected a list of objects with user and assistant"
        )
    turns = [{"role": role, "content": text.get(role)} for text in texts for role in ("user", "assistant")]
    return _with_pictures_first(turns, record, pictures)


def _prompt_and_completion(record: dict[str, Any], pictures: bool) -> Any:
    prompt, completion = record["prompt"], record["completion"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(turns, list) or not isinstance(answer, list):
        raise BadSample(
            "wrong_type", f"prompt is {type_name(prompt)}, completion {type_name(completion)}; expected text"
        )
    return _with_pictures_first([*turns, *answer], record, pictures)


def _query_and_response(record: dict[str, Any], pictures: bool) -> Any:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadSample("wrong_type", "history is not a list of pairs of query and response")
    pairs = [*history, [record["query"], record["response"]]]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return _with_pictures_first(turns, record, pictures)


def _with_pictures_first(turns: list[Any], record: dict[str, Any], pictures: bool) -> list[Any]:
    """Where no turn says where the pictures stand: before the first user's text, as TRL and ms-swift put them."""
    if not pictures or any(_mentions_picture(turn) for turn in turns):
        return turns
    for number, turn in enumerate(turns):
        if isinstance(turn, dict) and turn.get("role") == "user" and isinstance(turn.get("content"), str):
            marks = PLACEHOLDER * len(_own_pictures(record))
            return [*turns[:number], {**turn, "content": f"{marks}{turn['content']}"}, *turns[number + 1 :]]
    return turns


def _mentions_picture(turn: Any) -> bool:
    content = turn.get("content") if isinstance(turn, dict) else None
    return PLACEHOLDER in content if isinstance(content, str) else isinstance(content, list)


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], bool], Any]], ...] = (
    (("conversations",), lambda record, pictures: record["conversations"]),
    (("messages",), lambda record, pictures: record["messages"]),
    (("texts",), _texts),
    (("prompt", "completion"), _prompt_and_completion),
    (("query", "response"), _query_and_response),
)
"""Fields that a layout needs, and what makes its turns."""


def _first(record: dict[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _own_pictures(record: dict[str, Any]) -> list[Any]:
    """The pictures of the record as a whole. Null and "" are none."""
    fields = (record.get(name) for name in PICTURES)
    field = next((value for value in fields if not is_empty(value)), None)
    values = field if isinstance(field, list) else [field]
    return [value for value in values if not is_empty(value)]


def _merge(in_parts: list[Any], own: list[Any], folder: Path) -> list[bytes]:
    """The pictures in the order of the image parts: those that parts name, and in the places between the record's.

    Where the record lists all pictures and parts name some of them too, they must be the same.
    """
    waiting = sum(picture is None for picture in in_parts)
    contents = [image_bytes(picture, folder) for picture in own]
    if waiting == len(in_parts) or not own:
        return contents + [image_bytes(picture, folder) for picture in in_parts if picture is not None]
    if len(own) == waiting:
        rest = iter(contents)
        return [next(rest) if picture is None else image_bytes(picture, folder) for picture in in_parts]
    named = {place: image_bytes(picture, folder) for place, picture in enumerate(in_parts) if picture is not None}
    if len(own) != len(in_parts) or any(contents[place] != content for place, content in named.items()):
        raise BadSample(
            "conflicting_image",
            f"{len(in_parts)} image parts, of which {len(named)} name their picture; the record names {len(own)}: "
            "they are not the same, or not as many",
        )
    return contents


def _named(pictures: list[Any]) -> dict[str, Any]:
    """What provenance says of pictures that came as paths."""
    names = [picture for picture in pictures if isinstance(picture, str) and not picture.startswith("data:")]
    return {"images": names} if names and len(names) == len(pictures) else {}
