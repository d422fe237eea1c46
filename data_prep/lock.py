"""One run at a time may write an output folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.schema import DataError

LOCK = ".lock"
"""In the output folder while a run writes it; holds the process and its host."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Creates the folder where there is none.

    The lock is the operating system's (flock), so it ends with its process, however that ends; a file that a killed
    process left behind locks nothing. Raises DataError, with both processes, where another one holds it.
    """
    is_new = not folder.exists()
    file = _acquire(folder)
    try:
        if file is not None:
            os.ftruncate(file, 0)
            os.pwrite(file, _process().encode(), 0)
        yield
    finally:
        if file is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: who opened it before sees that it is gone
            os.close(file)
        if is_new:
            with contextlib.suppress(OSError):  # it has content
                folder.rmdir()


def _acquire(folder: Path) -> int | None:
    """The locked file; None where the file system has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(file, 1000, 0).decode(errors="replace")
            os.close(file)
            if isinstance(error, BlockingIOError):
                raise DataError(_in_use(folder, owner)) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            print(f"note: {folder} cannot be locked ({error.strerror}): let no other run write it", file=sys.stderr)
            return None
        if _stands_at(path, file):
            return file
        os.close(file)  # the one who held it has removed it


def _stands_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _in_use(folder: Path, owner: str) -> str:
    return (
        f"{folder} is being written by {owner or 'another process'}; this is {_process()}. Wait for it, or give "
        "another --output. Where one launcher started both, it is not MPI: use mpirun -n N, or srun --mpi=pmix"
    )


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
