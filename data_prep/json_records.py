"""The records of a JSON list, one after the other, in the memory of one record and one block of the file."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.schema import BadSample, DataError

BLOCK = 1 << 20
"""Bytes of the file that are read at once."""
MAX_DEPTH = 100
"""Lists and objects inside one another that a record may have. Chats have about 5."""


def list_records(file: BinaryIO, path: Path) -> Iterator[Any]:
    """Yield the elements of the JSON list in `file`; a BadSample in place of one that is nested too deeply.

    Bytes that are not UTF-8 become lone surrogates, which no sample may hold: so they cost their record only.
    Raises DataError where the list is broken, with the number of records before.
    """
    # Not ijson's C backend, although it is ten times as fast: it reads a lone surrogate as "?", and stops at an
    # integer of more than 64 bits. See docs/decisions/0008-libraries-and-what-stays-ours.md.
    from ijson.backends import python as ijson
    from ijson.common import JSONError

    read = 0
    try:
        # Not ijson.items: it makes a path for each event, which takes a minute where lists are nested 100,000 deep.
        for record in _elements(ijson.basic_parse(_Utf8(file), buf_size=BLOCK, use_float=True)):
            yield record
            read += 1
    except (JSONError, ValueError) as error:
        raise DataError(
            f"{path} is not whole JSON: after {read} good records: {error}. Mend it, or write one record a line "
            "(JSONL), where a broken line costs that line only"
        ) from None


def _elements(events: Iterator[tuple[str, Any]]) -> Iterator[Any]:
    """The elements of the outermost list."""
    from ijson.common import ObjectBuilder

    next(events)  # the list's start
    depth, deepest, builder = 0, 0, ObjectBuilder()
    for event, value in events:
        starts, ends = event.startswith("start"), event.startswith("end")
        if ends and depth == 0:  # of the outermost list; what follows it is an error, which ijson raises
            continue
        if depth < MAX_DEPTH or (ends and depth == MAX_DEPTH):
            builder.event(event, value)
        depth += starts - ends
        deepest = max(deepest, depth)
        if depth == 0:
            yield builder.value if deepest <= MAX_DEPTH else _too_deep(deepest)
            deepest, builder = 0, ObjectBuilder()


class _Utf8:
    """The bytes of a file as ijson takes them: without a byte order mark, and UTF-8 throughout."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode

    def read(self, size: int) -> bytes:
        """About `size` bytes; none at the end. A byte that is not UTF-8 comes as a JSON escape, such as \\udcff."""
        text = ""
        while size and not text:
            block = self._file.read(size)
            text = self._decode(block, not block)
            if not block:
                break
        return text.encode("utf-8", "backslashreplace")


def _too_deep(depth: int) -> BadSample:
    return BadSample("bad_json", f"{depth} lists and objects inside one another; at most {MAX_DEPTH} are read")
