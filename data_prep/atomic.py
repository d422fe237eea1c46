"""Atomic writes: a file is written under another name, brought to the disk, and then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""How the name of an unfinished file ends: .000000.tar.PID-RANDOM.partial"""


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    atomic = AtomicFile(path)
    try:
        atomic.file.write(content)
        atomic.commit()
    finally:
        atomic.discard()


class AtomicFile:
    """A file that gets its name when it is complete. Until `commit` it has a name that no other process uses."""

    def __init__(self, path: Path):
        """Creates the folder where there is none."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._own = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
        self.file: BinaryIO = open(self._own, "xb+")  # noqa: SIM115  # closed by commit or discard

    def commit(self) -> None:
        """Bring the file to the disk and give it its name, in place of a file that has it. Raises OSError."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self._own, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Remove the file if it was not committed. It is removed also where a full disk lets closing it fail."""
        try:
            with contextlib.suppress(OSError):
                self.file.close()
        finally:
            self._own.unlink(missing_ok=True)
