"""The order of the vocabulary that a cache's samples are drawn and stored in: the ids that the teacher uses most first.

V common vocabulary. Neighbours in it are alike in use, which makes a systematic sample even, and most ids of a sample
come from its beginning, which makes them cheap to store. Any order is right; every shard of a cache must have the same.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np

from data_prep.shards import write_file
from pipeline.errors import CacheError
from pipeline.teacher.fingerprint import file_sha256

ORDER = "order.int32"


def order_by_use(use: np.ndarray) -> np.ndarray:
    """use [V] (any measure of how often the teacher says each id) -> all ids [V] int32, equal ones by id."""
    return np.argsort(-use, kind="stable").astype("<i4")


def save_order(path: Path, order: np.ndarray) -> None:
    """Give a cache folder its order. Of jobs that do so at once the first wins, and all must read what it wrote.

    CacheFolder.check_order finds it where the file system could not hold to that.
    """
    file = path / ORDER
    aside = file.with_name(f".{ORDER}.{secrets.token_hex(8)}.partial")
    write_file(aside, order.astype("<i4").tobytes())
    try:
        os.link(aside, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: between these two lines another job may come first
        if not file.exists():
            os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def has_order(path: Path) -> bool:
    """Whether a cache folder has its order."""
    return (path / ORDER).is_file()


def read_order(path: Path, vocab: int, repair: str) -> np.ndarray:
    """A cache's order [V]. Raises CacheError, ending in the words `repair`, where it is gone or no order of V ids."""
    try:
        order = np.fromfile(path / ORDER, "<i4")
    except FileNotFoundError:
        raise CacheError(f"{path}: no {ORDER}, the order of the vocabulary. {repair}") from None
    if not np.array_equal(np.sort(order), np.arange(vocab)):
        raise CacheError(f"{path / ORDER} is damaged: expected each of {vocab} ids once. Remove it. {repair}")
    return order


def order_sha256(path: Path) -> str | None:
    """The hash of a cache's order, None where there is none."""
    return file_sha256(path / ORDER) if has_order(path) else None
