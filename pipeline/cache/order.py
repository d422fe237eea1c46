"""A cache's vocabulary order on disk: order.int32. Every shard of the cache is coded with it."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import numpy as np

from data_prep.shards import write_file
from data_prep.storage import is_file, is_url, read_bytes
from pipeline.errors import CacheError

ORDER = "order.int32"


def save_order(path: Path, order: np.ndarray) -> None:
    """Write a cache folder's order, unless it has one. If several jobs do this at once, the first one wins.

    All jobs must then read the stored order back. Without hard links the file system cannot guarantee that the first
    one wins; CacheFolder.check_order detects such a case.
    """
    file = path / ORDER
    if is_url(path):  # check_order detects that another job wrote one meanwhile
        if not is_file(file):
            write_file(file, order.astype("<i4").tobytes())
        return
    partial = file.with_name(f".{ORDER}.{secrets.token_hex(8)}.partial")
    write_file(partial, order.astype("<i4").tobytes())
    try:
        os.link(partial, file)
    except FileExistsError:
        pass
    except OSError:  # no hard links: another job may write between the next two lines
        if not file.exists():
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def has_order(path: Path) -> bool:
    """Whether a cache folder has an order file."""
    return is_file(path / ORDER)


def read_order(path: Path, vocab: int, repair: str) -> np.ndarray:
    """A cache's order [V] int32.

    Raises CacheError where it is missing or does not hold each of V ids once. The message ends in `repair`.
    """
    try:
        content = read_bytes(path / ORDER)
    except FileNotFoundError:
        raise CacheError(f"{path}: no {ORDER}, the order of the vocabulary. {repair}") from None
    order = np.frombuffer(bytearray(content[: len(content) // 4 * 4]), "<i4")  # bytearray: torch wants writable memory
    if not np.array_equal(np.sort(order), np.arange(vocab)):
        raise CacheError(f"{path / ORDER} is damaged: expected each of {vocab} ids once. Remove it. {repair}")
    return order


def order_sha256(path: Path) -> str | None:
    """The SHA-256 of a cache's order file; None where there is none."""
    return hashlib.sha256(read_bytes(path / ORDER)).hexdigest() if has_order(path) else None
