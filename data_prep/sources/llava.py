"""LLaVA and ShareGPT files: JSON and JSONL, images in a folder beside them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.json_records import METADATA, json_records
from data_prep.layouts import read_sample
from data_prep.schema import DataError
from data_prep.sources import LazyRecord, Sample, source


def options(parser: argparse.ArgumentParser) -> None:
    """The options of --source llava."""
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FILE",
        help=f"the JSON or JSONL file, also as .gz; or a folder with {METADATA} and images",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder that image paths start from (default: that of FILE)"
    )


@source("llava", options)
def read(args: argparse.Namespace) -> Iterator[LazyRecord]:
    """LLaVA/ShareGPT JSON or JSONL: conversations of human and gpt turns, <image> placeholders, image: path or paths.

    Raises DataError where the file is not there, is of another kind or, not being JSONL, is broken.
    """
    path = args.input / METADATA if args.input.is_dir() else args.input
    images = args.images if args.images is not None else path.parent
    if not path.is_file():
        raise DataError(f"--input {path}: no such file; expected LLaVA JSON or JSONL")
    if not images.is_dir():
        raise DataError(f"--images {images}: no such folder; image paths are taken as relative to it")
    for found in json_records(path):
        yield LazyRecord(partial(_sample, found.value, images), path.name, line=found.line, progress=found.progress)


def _sample(value: object, images: Path) -> Sample:
    return read_sample(value() if callable(value) else value, images)
