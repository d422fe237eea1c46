"""The questions that are traced: one about an image file, or those of a shard folder's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.schema import BadSample
from data_prep.shards import ShardFolder
from pipeline.errors import RecipeError, SampleError
from pipeline.results.arguments import evenly_spaced, open_non_empty
from pipeline.results.evaluate.answers import last_exchange
from pipeline.runtime.display.progress import say


@dataclass(frozen=True)
class Question:
    """A chat up to the assistant turn to be generated."""

    key: str
    """Key of the sample; the file's name for an image file."""
    messages: Sequence[Mapping[str, Any]]
    images: Sequence[bytes]
    expected: str | None = None
    """The reference answer; None if there is none."""

    @property
    def text(self) -> str:
        """Text of the last turn, with [image] for each image."""
        parts = self.messages[-1]["content"]
        return " ".join("[image]" if part["type"] == "image" else part["text"] for part in parts)


def question_from_file(image: Path, text: str, answer: str | None = None) -> Question:
    """A question about an image file. Raises RecipeError if there is no such file."""
    if not image.is_file():
        raise RecipeError(f"--image {image}: no such file")
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return Question(image.name, [{"role": "user", "content": content}], [image.read_bytes()], answer)


def question_from_data(data: Path | None, key: str) -> Question:
    """The last question of a sample. Raises RecipeError if the folder has no such key."""
    folder = ShardFolder(_data_of(data, "--sample"))
    if key not in folder.keys:
        first = ", ".join(folder.keys[:3])
        raise RecipeError(f"--sample {key}: not among the {len(folder)} keys of {data}; the first are {first}")
    return _question(folder, folder.keys.index(key))


def questions_from_data(data: Path | None, limit: int) -> list[Question]:
    """The last questions of `limit` samples at most, evenly spaced; one that has none is left out, and said."""
    folder = open_non_empty(_data_of(data, "--limit"))
    found = []
    for index in evenly_spaced(len(folder), limit):
        try:
            found.append(_question(folder, index))
        except (SampleError, BadSample) as error:
            say(f"{folder.keys[index]} is left out: {error}")
    return found


def _data_of(data: Path | None, option: str) -> Path:
    if data is None:
        raise RecipeError(f"{option} needs --data SHARDS, or data.held_out in the run's recipe")
    return data


def _question(folder: ShardFolder, index: int) -> Question:
    raw = folder.read(index)
    exchange = last_exchange(raw.record, raw.images)
    return Question(folder.keys[index], exchange.messages, exchange.images, exchange.answer)
