"""Files that one rank, or another job, has just written: rank 0's word goes, and each rank waits until it sees them.

Over NFS a host may for up to a minute find a file missing, shorter or as it was before another host wrote it: what it
asked for earlier is remembered (acregmax, acdirmax). So no rank decides anything by what it alone sees.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_prep.schema import DataError as ShardError
from data_prep.storage import is_url
from pipeline.errors import StorageError, UserError
from pipeline.runtime.ranks import Ranks, gather_when_ready, of_first_rank_when_ready

Seen = TypeVar("Seen")

WAIT_S = 180.0
"""How long a file may stay unseen: three times what NFS remembers by default."""
POLL_S = 0.5
COMPARED = 2**20
"""Bytes of the largest file whose content is compared. A larger one has a new name or another size when it changes."""

View = dict[str, tuple[int, str]]
"""{path below the asked one: (bytes, SHA-256 of a small file)}."""


def as_first_rank_sees(ranks: Ranks, what: str, look: Callable[[], Seen]) -> Seen:
    """What look() gives on rank 0, or the UserError that it raises there, on every rank. All ranks must call."""

    def make() -> Any:
        try:
            return look() if ranks.first else None
        except (UserError, ShardError) as error:
            return error

    seen = of_first_rank_when_ready(ranks, what, make)
    if isinstance(seen, (UserError, ShardError)):
        raise seen
    return seen


def wait_for_files(ranks: Ranks, paths: Sequence[Path]) -> None:
    """Wait until each rank sees these files, and all files in these folders, as rank 0 does. All ranks must call.

    Raises StorageError, on all ranks, where one of them does not within WAIT_S. Once it returns, all may be opened.
    """
    paths = [path for path in paths if not is_url(path)]  # an object store shows everyone the same
    what = f"waiting until all hosts see {', '.join(map(str, paths))}"
    expected = as_first_rank_sees(ranks, what, lambda: [view_of(path) for path in paths])

    def make() -> list[str]:
        return [late for path, view in zip(paths, expected, strict=True) if (late := _wait_for(path, view, ranks.rank))]

    if unseen := gather_when_ready(ranks, what, make):
        raise StorageError(
            f"{unseen[0]}. Expected one file system that all hosts share under the recipe's run, data and models; "
            "mount it on that host, or leave the host out"
        )


def wait_until(ready: Callable[[], bool]) -> bool:
    """Ask until it is so, for at most WAIT_S; returns whether it is."""
    end = time.monotonic() + WAIT_S
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def view_of(path: Path) -> View:
    """A file, or all files of a folder but hidden ones, as this host sees them now. Nothing where there is none."""
    return {name: seen for name, file in _files(path) if (seen := _look_at(file)) is not None}


def _files(path: Path) -> Iterable[tuple[str, Path]]:
    if not path.is_dir():
        return [("", path)]
    return [(str(file.relative_to(path)), file) for file in sorted(path.rglob("*")) if file.is_file() and _shown(file)]


def _shown(file: Path) -> bool:
    return not file.name.startswith(".")


def _look_at(file: Path) -> tuple[int, str] | None:
    """Opened, not only asked for its size: NFS asks the server again when a file is opened."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            return size, hashlib.sha256(opened.read()).hexdigest() if size <= COMPARED else ""
    except OSError:  # not there yet, or replaced while it was opened
        return None


def _wait_for(path: Path, expected: View, rank: int) -> str | None:
    """What this rank does not see, after waiting for it; None where it sees all."""
    if wait_until(lambda: expected.items() <= view_of(path).items()):
        return None
    found = view_of(path)
    name = next(name for name in expected if found.get(name) != expected[name])
    seen = f"{found[name][0]} bytes, of other content or size" if name in found else "no such file"
    return (
        f"rank {rank} on {socket.gethostname()} does not see {path / name} as rank 0 does, after {WAIT_S:.0f} s: "
        f"expected {expected[name][0]} bytes, found {seen}"
    )
