"""Atomic writes: a file is written under another name, brought to the disk, and then renamed.

Also what to tell a user of a disk or a file system that does not take it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.storage import Upload, is_url

PARTIAL = ".partial"
"""How the name of an unfinished file ends: .000000.tar.PID-RANDOM.partial"""

ADVICE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota there, or have it raised",
    errno.EROFS: "mount it for writing, or choose another folder",
    errno.EACCES: "give this user the right to it, or choose another folder",
    errno.EPERM: "give this user the right to it, or choose another folder",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EIO: "the disk or its connection fails: see the log of the machine (dmesg)",
    errno.ESTALE: "the file server has dropped it: see whether it is mounted there still",
    errno.ENOTCONN: "the file server is not reached: see whether it is mounted there still",
    errno.EHOSTDOWN: "the file server is not reached: see whether it is mounted there still",
}
"""What to do about the errors of a disk or a file system, which no program can mend."""
OF_SOCKETS_TOO = {errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.EHOSTDOWN}
"""Numbers of those that are of a file only where the error names one."""


def storage_fault(error: BaseException) -> str | None:
    """What to tell the user of an error of a disk or a file system; None of any other error."""
    if not isinstance(error, OSError) or error.errno not in ADVICE:
        return None
    if error.filename is None and error.errno in OF_SOCKETS_TOO:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}{os.strerror(error.errno)}; {ADVICE[error.errno]}, and run the same command again: what is whole stays"
    )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError of this block name the file: one of writing to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    atomic = atomic_file(path)
    try:
        with naming(path):
            atomic.file.write(content)
            atomic.commit()
    finally:
        atomic.discard()


def atomic_file(path: Path) -> AtomicFile | Upload:
    """A file to write that gets its name when it is complete, on a disk or behind a URL."""
    return Upload(path) if is_url(path) else AtomicFile(path)


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
        sync(self._path.parent)

    def discard(self) -> None:
        """Remove the file if it was not committed. It is removed also where a full disk lets closing it fail."""
        try:
            with contextlib.suppress(OSError):
                self.file.close()
        finally:
            self._own.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk. Raises OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
