"""The records of a JSON or JSONL file, one after the other, in the memory of one record and one block of the file.

Read are: one record a line (JSONL); a list of records; an object that holds the list, {"data": [...]}; objects printed
over several lines. Any of these may be gzipped, have a byte order mark, or be in UTF-16 or UTF-32.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_prep.schema import BadSample, DataError

METADATA = "metadata.jsonl"
"""In an image folder, the file with a line for each image."""
BLOCK = 1 << 20
"""Characters of the file that are parsed at once."""
HEAD = 1 << 16
"""Bytes of the file's start that tell its layout."""
MAX_DEPTH = 100
"""Lists and objects inside one another that a record may have. Chats have about 5."""
LIST_FIELDS = ("data", "annotations", "samples", "records", "examples", "items", "rows")
"""Fields of an outermost object that hold the list of records."""

OTHER_FILES = {
    b"PAR1": "a parquet file: read it with --source hf",
    b"ARROW1": "an arrow file: read it with --source hf",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it, or gzip it",
    b"BZh": "compressed with bzip2: unpack it, or gzip it",
    b"\xfd7zXZ": "compressed with xz: unpack it, or gzip it",
}
"""How a file of another kind starts -> what it is, and what to do."""


@dataclass(frozen=True)
class Found:
    """A record of the file."""

    value: Any
    """The parsed JSON; a BadSample where it cannot be used; of a line, a function that parses it."""
    line: int | None
    """The line it stands in, from 1, where it has one of its own."""
    progress: float
    """Share of the file that has been read, 0 to 1."""


def json_records(path: Path) -> Iterator[Found]:
    """Yield the records of a file.

    Bytes that are not UTF-8 cost their record only, and a broken line costs that line. Raises DataError where the file
    is of another kind, or is one JSON value and broken: with the number of records before.
    """
    size = max(1, path.stat().st_size)
    with open(path, "rb") as raw:
        start = raw.read(8)
        raw.seek(0)
        for magic, kind in OTHER_FILES.items():
            if start.startswith(magic):
                raise DataError(f"--input {path} is {kind}. Expected JSON or JSONL, as they are or gzipped")
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if start.startswith(b"\x1f\x8b") else raw
        try:
            encoding, by_line = _layout(file)
            records = _lines(file, encoding) if by_line else ((None, value) for value in _values(file, encoding, path))
            for line, value in records:
                yield Found(value, line, raw.tell() / size)
        except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise DataError(f"--input {path} is damaged: {error}") from None


def _layout(file: BinaryIO) -> tuple[str, bool]:
    """The encoding, and whether each line is a record. Leaves the file at its start."""
    head = file.read(HEAD)
    whole = not file.read(1)
    file.seek(0)
    encoding = json.detect_encoding(head)
    text = head.decode(encoding, "ignore").lstrip()
    first, *others = text.split("\n")
    following = next((line.strip() for line in others if line.strip()), "")
    if text.startswith("["):
        return encoding, False
    if re.match(rf'\{{\s*"({"|".join(LIST_FIELDS)})"\s*:\s*\[', text) and (not following or not _is_object(first)):
        return encoding, False
    if whole and not following and _holds_list(first):
        return encoding, False
    # An object over several lines: a line of JSONL that was cut off is followed by another object
    opens = first.startswith("{") and first.rstrip().endswith(("{", "[", ",")) and following[:1] in ('"', "}")
    return encoding, not opens


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _holds_list(line: str) -> bool:
    return _is_object(line) and any(isinstance(json.loads(line).get(field), list) for field in LIST_FIELDS[:1])


def _lines(file: BinaryIO, encoding: str) -> Iterator[tuple[int, Callable[[], Any]]]:
    lines = (
        file
        if encoding.startswith("utf-8")
        else (line.encode("utf-8", "surrogatepass") for line in _text(file, encoding))
    )
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, partial(_parse_line, line)


def _parse_line(line: bytes) -> Any:
    """Raises BadSample: bad_utf8, bad_json."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8", f"byte {error.start} of the line: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from None


def _values(file: BinaryIO, encoding: str, path: Path) -> Iterator[Any]:
    """The records of a list, of an object that holds a list, or of objects one after the other."""
    # Not ijson's C backend, although it is ten times as fast: it reads a lone surrogate as "?", and stops at an
    # integer of more than 64 bits. See docs/decisions/0008-libraries-and-what-stays-ours.md.
    from ijson.backends import python as ijson
    from ijson.common import JSONError

    read = 0
    try:
        # Not ijson.items: it makes a path for each event, which takes a minute where lists are nested 100,000 deep.
        source = _Utf8(_text(file, encoding))
        events = ijson.basic_parse(source, buf_size=BLOCK, use_float=True, multiple_values=True)
        for event, value in events:
            if read and event == "start_array":
                raise ValueError("another list follows the first")
            for record in _outermost(event, value, events):
                yield record
                read += 1
    except UnicodeDecodeError:
        raise
    except (JSONError, ValueError) as error:
        raise DataError(
            f"{path} is not whole JSON: after {read} good records: {error}. Mend it, or write one record a line "
            "(JSONL), where a broken line costs that line only"
        ) from None


Events = Iterator[tuple[str, Any]]
"""What ijson tells of a file, piece by piece."""


def _outermost(event: str, value: Any, events: Events) -> Iterator[Any]:
    """The records in a value that is in no other; its first event has been taken already."""
    if event == "start_array":
        yield from _elements(events)
    elif event == "start_map":
        yield from _object(events)
    else:
        yield value


def _elements(events: Events) -> Iterator[Any]:
    for event, value in events:
        if event == "end_array":
            return
        yield _built(event, value, events)


def _object(events: Events) -> Iterator[Any]:
    """The elements of the object's list of records where it has one, else the object itself."""
    fields: dict[str, Any] = {}
    held = False
    for event, key in events:
        if event == "end_map":
            break
        event, value = next(events)
        if event == "start_array" and key in LIST_FIELDS:
            held = True
            yield from _elements(events)
        else:
            fields[key] = _built(event, value, events)
    if not held:
        yield next((value for value in fields.values() if isinstance(value, BadSample)), fields)


def _built(event: str, value: Any, events: Events) -> Any:
    """A value from its events; BadSample in place of one that is nested too deeply."""
    from ijson.common import ObjectBuilder

    depth, deepest, builder = 0, 0, ObjectBuilder()
    while True:
        starts, ends = event.startswith("start"), event.startswith("end")
        if depth < MAX_DEPTH or (ends and depth == MAX_DEPTH):
            builder.event(event, value)
        depth += starts - ends
        deepest = max(deepest, depth)
        if depth == 0:
            break
        event, value = next(events)
    if deepest > MAX_DEPTH:
        return BadSample("bad_json", f"{deepest} lists and objects inside one another; at most {MAX_DEPTH} are read")
    return builder.value


def _text(file: BinaryIO, encoding: str) -> io.TextIOWrapper:
    """The file's text, without a byte order mark. What cannot be decoded becomes lone surrogates."""
    is_utf8 = encoding.startswith("utf-8")
    errors = "surrogateescape" if is_utf8 else "surrogatepass"
    return io.TextIOWrapper(file, "utf-8-sig" if is_utf8 else encoding, errors, newline="\n")


class _Utf8:
    """A text as ijson takes it: bytes of UTF-8. A lone surrogate comes as a JSON escape, such as \\udcff."""

    def __init__(self, text: io.TextIOWrapper):
        self._text = text

    def read(self, size: int) -> bytes:
        """Up to `size` characters; none at the end."""
        return self._text.read(size).encode("utf-8", "backslashreplace")
