"""LLaVA and ShareGPT files: JSON (one list) and JSONL (one object a line), images in a folder beside them."""

from __future__ import annotations

import argparse
import codecs
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.chats import to_messages
from data_prep.images import read_image
from data_prep.schema import BadSample, DataError, about
from data_prep.sources import Draft, Sample, source

CHUNK = 1 << 20
"""Characters of a JSON list that are looked at together; a file is never held whole."""


def options(parser: argparse.ArgumentParser) -> None:
    """The options of --source llava."""
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="the JSON or JSONL file")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder that image paths start from (default: that of FILE)"
    )


@source("llava", options)
def read(args: argparse.Namespace) -> Iterator[Draft]:
    """LLaVA/ShareGPT JSON or JSONL: conversations of human and gpt turns, <image> placeholders, image: path or paths.

    Raises DataError where the file is not there or, being one JSON list, is broken beyond the next record.
    """
    images = args.images if args.images is not None else args.input.parent
    if not args.input.is_file():
        raise DataError(f"--input {args.input}: no such file; expected LLaVA JSON or JSONL")
    if not images.is_dir():
        raise DataError(f"--images {images}: no such folder; image paths are taken as relative to it")
    size = max(1, args.input.stat().st_size)
    with open(args.input, "rb") as file:
        if _is_list(file):
            for record in _list_records(file, args.input):
                yield Draft(partial(_sample, record, images), args.input.name, done=file.tell() / size)
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    make = partial(_line_sample, line, images)
                    yield Draft(make, args.input.name, line=number, done=file.tell() / size)


def _line_sample(line: bytes, images: Path) -> Sample:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8", f"byte {error.start} of the line: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from None
    return _sample(record, images)


def _sample(record: Any, images: Path) -> Sample:
    if not isinstance(record, dict):
        raise BadSample("wrong_type", f"the record is a {type(record).__name__}; expected an object")
    with about(record.get("id")):
        turns = record.get("conversations", record.get("messages"))
        names = _image_names(record)
        messages = to_messages(turns)
        content = [read_image(images, name) for name in names]
        return Sample(messages, content, id=record.get("id"), provenance={"images": names} if names else {})


def _image_names(record: dict[str, Any]) -> list[Any]:
    names = record.get("image", record.get("images"))
    if names is None:
        return []
    return names if isinstance(names, list) else [names]


def _is_list(file: BinaryIO) -> bool:
    """Whether the file's first character opens a JSON list; leaves the file at its start."""
    start = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _list_records(file: BinaryIO, path: Path) -> Iterator[Any]:
    """The elements of a JSON list, one after the other, in the memory of one chunk and one element.

    Bytes that are not UTF-8 become lone surrogates, which no sample is allowed to have: so only their record is lost.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, read = _Text(file, decode), 0
    text.skip_blanks()
    text.take("\ufeff", optional=True)
    text.skip_blanks()
    text.take("[")
    while True:
        text.skip_blanks()
        if text.peek() == "]":
            return
        try:
            yield text.element()
            read += 1
            text.skip_blanks()
            if text.peek() != "]":
                text.take(",")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not whole JSON: after {read} good records: {error}. Mend it, or write one record a line "
                "(JSONL), where a broken line costs that line only"
            ) from None


class _Text:
    """The characters of a file from a position on, as many as were needed so far."""

    def __init__(self, file: BinaryIO, decode: Any):
        self._file, self._decode = file, decode
        self._text, self._place, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character; empty at the end."""
        while self._place == len(self._text) and not self._ended:
            self._more(CHUNK)
        return self._text[self._place : self._place + 1]

    def skip_blanks(self) -> None:
        while self.peek() and self.peek() in " \t\r\n":
            self._place += 1

    def take(self, expected: str, optional: bool = False) -> None:
        """Step over a character. Raises ValueError where another stands there."""
        if self.peek() == expected:
            self._place += 1
        elif not optional:
            raise ValueError(f"expected {expected!r}, found {self.peek() or 'the end of the file'!r}")

    def element(self) -> Any:
        """Parse one JSON value. Raises ValueError where there is none up to the end of the file."""
        size = CHUNK
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._place)
            except ValueError:
                if self._ended:
                    raise
            else:
                if end < len(self._text) or self._ended:  # else it may go on in the next chunk, as numbers do
                    self._place = end
                    return value
            self._more(size)
            size *= 2  # a long element is parsed again from its start only a few times

    def _more(self, size: int) -> None:
        block = self._file.read(size)
        self._ended = len(block) < size
        self._text = self._text[self._place :] + self._decode(block, self._ended)
        self._place = 0
