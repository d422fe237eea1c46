"""How large a sample is, before any model reads it: characters of its chat, width and height of each image.

Training sorts each global batch by an estimate of the samples' tokens, which it makes from these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.images import image_size
from data_prep.schema import BadSample


@dataclass(frozen=True)
class SampleSize:
    """A sample's size."""

    characters: int
    """Of all texts of its chat."""
    images: tuple[tuple[int, int], ...]
    """(width, height) of each image in pixels, as its file says, so before any turning; (0, 0) of one that no reader
    opens."""

    def to_json(self) -> list[int]:
        """[characters, width, height, width, height, ...], as a manifest has it."""
        return [self.characters, *(side for image in self.images for side in image)]

    @classmethod
    def from_json(cls, numbers: list[int]) -> SampleSize:
        """The inverse of to_json."""
        characters, *sides = numbers
        return cls(characters, tuple(zip(sides[::2], sides[1::2], strict=True)))


def sample_size(members: Mapping[str, bytes]) -> SampleSize | None:
    """The size of a sample from its members, {"json": b"...", "0.png": b"..."}; None where they hold no chat."""
    try:
        messages = json.loads(members["json"])["messages"]
        characters = sum(len(part.get("text", "")) for turn in messages for part in turn["content"])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return None
    return SampleSize(characters, tuple(_size(content) for name, content in members.items() if name != "json"))


def is_size(value: Any) -> bool:
    """Whether a manifest's value is what SampleSize.to_json gives."""
    if not isinstance(value, list) or len(value) % 2 == 0:
        return False
    return all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in value)


def _size(content: bytes) -> tuple[int, int]:
    try:
        return image_size(content)
    except BadSample:
        return 0, 0
