"""Files that are whole or not there: written under another name, brought to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""End of the name of a file in the making: .000000.tar.PID-RANDOM.partial"""


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: aside, fsynced, renamed."""
    aside = Aside(path)
    try:
        aside.file.write(content)
        aside.commit()
    finally:
        aside.discard()


class Aside:
    """A file under a name of this process's own, which takes the final name when it is whole and on the disk."""

    def __init__(self, path: Path):
        """Makes the folder where there is none."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._own = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
        self.file: BinaryIO = open(self._own, "xb+")  # noqa: SIM115  # closed by commit or discard

    def commit(self) -> None:
        """Give the file its final name, in place of what may have it."""
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
        """Remove what was not committed, also where the disk is so full that closing the file fails."""
        try:
            with contextlib.suppress(OSError):
                self.file.close()
        finally:
            self._own.unlink(missing_ok=True)
