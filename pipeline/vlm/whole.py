"""Write what others' libraries write - safetensors, a Hugging Face folder - whole or not at all, and to the disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from data_prep.atomic import sync

_NUMBER = re.compile(r"(?:os error |\[Errno )(\d+)")
"""How safetensors and shutil give the operating system's error inside a text."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the path to write the file to; without an error it then stands at `path`, in place of an older one.

    Raises OSError, naming `path`, where the disk does not take it: also where a library says so in its own way.
    """
    aside = _aside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _or_nothing(path, aside):
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As whole_file, for a folder."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    with _or_nothing(path, aside):
        aside.mkdir(parents=True)
        yield aside
        for file in [*aside.rglob("*"), aside]:
            sync(file)
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        sync(path.parent)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextmanager
def _or_nothing(path: Path, aside: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) and error.errno else _number_in(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:  # a full disk is not kept full by what is of no use
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _number_in(error: Exception) -> int | None:
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None
