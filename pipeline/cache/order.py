"""A cache's vocabulary order on disk: order.int32, which every shard of the cache is coded with."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np

from data_prep.shards import write_file
from pipeline.cache.fingerprint import file_sha256
from pipeline.errors import CacheError

ORDER = "order.int32"


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
