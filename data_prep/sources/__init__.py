"""Where samples come from. Each file here is one source: a function that yields records, and its own options.

A new source is such a file and nothing else:

    def options(parser):
        parser.add_argument("--input", type=Path, required=True, help="...")

    @source("my-data", options)
    def read(args):
        '''One sentence for --help.'''
        for line in ...:
            yield LazyRecord(lambda line=line: Sample(messages=..., images=[...]), file="my.jsonl")

Every MPI rank iterates over all records in the same order, so a record must be cheap to make. What costs time (parsing,
reading images) belongs in its `load`, which only the rank that needs the sample calls.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A sample as a source yields it, not yet checked."""

    messages: list[dict[str, Any]]
    """The chat, as data_prep.schema describes it."""
    images: list[bytes]
    """Image files, byte for byte as they came, in the order of the chat's image parts."""
    id: Any = None
    """A string or a whole number; None: an id is made from the record's place in the source."""
    split: str | None = None
    """train or held_out, where the source has a split of its own; None: split by the images' content."""
    question_type: str | None = None
    """What evaluation groups by, where the source has types."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Whatever else tells where it came from (JSON); source, file and index are added."""


@dataclass(frozen=True)
class LazyRecord:
    """A record of the source that has not been converted yet."""

    load: Callable[[], Sample]
    """Reads and converts the record. Raises BadSample; inside schema.tag_with_id(id) the reject carries the id."""
    file: str = ""
    """Name of the file it stands in, without folders."""
    line: int | None = None
    """Its line in that file, from 1, where it has one."""
    progress: float | None = None
    """Share of the source that has been read with it, 0 to 1, for the time left; None: unknown."""


@dataclass(frozen=True)
class Source:
    """A registered source."""

    name: str
    read: Callable[[argparse.Namespace], Iterator[LazyRecord]]
    add_options: Callable[[argparse.ArgumentParser], None]

    @property
    def summary(self) -> str:
        """The first sentence of the reading function's docstring."""
        return (self.read.__doc__ or "").strip().split("\n")[0]


_SOURCES: dict[str, Source] = {}


def source(
    name: str, options: Callable[[argparse.ArgumentParser], None]
) -> Callable[
    [Callable[[argparse.Namespace], Iterator[LazyRecord]]], Callable[[argparse.Namespace], Iterator[LazyRecord]]
]:
    """Register the decorated function as `--source name`; options(parser) declares the options that it understands."""

    def register(
        read: Callable[[argparse.Namespace], Iterator[LazyRecord]],
    ) -> Callable[[argparse.Namespace], Iterator[LazyRecord]]:
        _SOURCES[name] = Source(name, read, options)
        return read

    return register


def all_sources() -> dict[str, Source]:
    """Every source of this folder, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_SOURCES.items()))


def fraction(text: str) -> float:
    """An option's value between 0 and 1. Raises argparse.ArgumentTypeError otherwise."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a share from 0 to 1, such as 0.05")
    return value


def non_negative_int(text: str) -> int:
    """An option's value that counts something. Raises argparse.ArgumentTypeError unless it is a whole number >= 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, 0 or more")
    return int(text)


def colour(text: str) -> str:
    """An option's value that is a colour. Raises argparse.ArgumentTypeError unless Pillow knows it."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a colour, such as white or '#808080'") from None
    return text


def positive_int(text: str) -> int:
    """An option's value that counts something of which one at least is needed. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, 1 or more")
    return int(text)
