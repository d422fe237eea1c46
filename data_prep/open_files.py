"""The files of a folder that a process keeps open, the last used ones.

Samples are read in random order, so nearly every read is of another shard than the one before. With few files kept,
each read opens one, which asks a file server for two things more than the read itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

FEWEST = 32
"""Files that a folder keeps open at least."""
MOST_ASKED = 2**16
"""Open files that a process asks for: more than shards of any data set; some systems refuse an unlimited number."""


class OpenFiles:
    """Files of one folder, opened when needed. Each process has its own: a copy sent to another one is empty."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, BinaryIO] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_open": {}}

    def __len__(self) -> int:
        return len(self._open)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file. Raises OSError, and ValueError where the file has fewer."""
        file = self.descriptor(name)
        missing = offset + size - os.fstat(file).st_size
        if missing > 0:  # asked before memory of the claimed size is taken
            raise ValueError(f"the file ends {missing} bytes early")
        return os.pread(file, size, offset)  # pread: a forked worker shares this file's position with its parent

    def descriptor(self, name: str) -> int:
        """The open file of this name. Raises OSError where it cannot be opened."""
        file = self._open.pop(name, None)
        if file is None:
            while len(self._open) >= most_open():
                self._open.pop(next(iter(self._open))).close()
            file = open(self.folder / name, "rb", buffering=0)  # noqa: SIM115  # stays open
        self._open[name] = file  # last: the first one is the one not used for longest
        return file.fileno()


def most_open() -> int:
    """Files that a folder may keep open: a quarter of what the process may open.

    A loader worker reads two folders, data and cache, and hands its tensors over through files too.
    """
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return FEWEST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(FEWEST, (MOST_ASKED if soft == resource.RLIM_INFINITY else min(soft, MOST_ASKED)) // 4)


def allow_open_files() -> None:
    """Raise this process's limit of open files, 1,024 on most systems, as far as the system lets it."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_ASKED if hard == resource.RLIM_INFINITY else min(hard, MOST_ASKED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
