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
from data_prep.json_records import list_records
from data_prep.schema import BadSample, DataError, tag_with_id
from data_prep.sources import LazyRecord, Sample, source

BLOCK = 1 << 16
"""Bytes of the file's start that are looked at to tell a JSON list from JSONL."""


def options(parser: argparse.ArgumentParser) -> None:
    """The options of --source llava."""
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="the JSON or JSONL file")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder that image paths start from (default: that of FILE)"
    )


@source("llava", options)
def read(args: argparse.Namespace) -> Iterator[LazyRecord]:
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
            for record in list_records(file, args.input):
                yield LazyRecord(partial(_sample, record, images), args.input.name, progress=file.tell() / size)
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    make = partial(_line_sample, line, images)
                    yield LazyRecord(make, args.input.name, line=number, progress=file.tell() / size)


def _line_sample(line: bytes, images: Path) -> Sample:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8", f"byte {error.start} of the line: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from None
    return _sample(record, images)


def _sample(record: Any, images: Path) -> Sample:
    if isinstance(record, BadSample):
        raise record
    if not isinstance(record, dict):
        raise BadSample("wrong_type", f"the record is a {type(record).__name__}; expected an object")
    with tag_with_id(record.get("id")):
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
    start = file.read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")
