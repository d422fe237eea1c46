"""One process at a time may write an output folder, or a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.schema import DataError
from data_prep.storage import is_url

LOCK = ".lock"
"""In the output folder while a run writes it; holds the process and its host."""

POLL_S = 0.2
DEAD_HOST_S = 150.0
"""How long to wait, at least, for a lock that another host holds: NFSv4 keeps a dead host's for its lease, mostly 90 s,
NFSv3 until that host is up again."""

ANOTHER_OUTPUT = (
    "give another --output. Where one launcher started both, it is not MPI: use mpirun -n N, or srun --mpi=pmix"
)
"""What to do, besides to wait, where two runs of data_prep want one output folder."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Creates the folder where there is none. Raises DataError as `lock_file` does."""
    if is_url(folder):  # an object store has no locks
        print(f"note: {folder} cannot be locked: let no other run write it", file=sys.stderr)
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(folder / LOCK, str(folder), ANOTHER_OUTPUT):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it has content
                folder.rmdir()


@contextlib.contextmanager
def lock_file(path: Path, subject: str, advice: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock that stands at `path` while it is held. Its folder must be there.

    wait_s: how long to wait for another process that holds it; a killed job's last processes may need a moment. One of
    another host is waited for DEAD_HOST_S at least, and named meanwhile, with the file to remove if that host is dead.

    The lock is the operating system's (flock), so it ends with its process, however that ends; a file that a killed
    process left behind locks nothing. Raises DataError, with both processes, where another one holds it. The message
    says that `subject` is being written and, besides to wait, what to do: `advice`.
    """
    file = _acquire(path, subject, advice, wait_s)
    try:
        if file is not None:
            os.ftruncate(file, 0)
            os.pwrite(file, _process().encode(), 0)
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is held: who opened it before sees that it is gone
            os.close(file)


def _acquire(path: Path, subject: str, advice: str, wait_s: float) -> int | None:
    """The locked file; None where the file system has no locks."""
    begun, is_said = time.monotonic(), False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(file, 1000, 0).decode(errors="replace")
            os.close(file)
            way_out = "" if owner.endswith(_here()) else f". If that host is dead, remove {path}"
            wait_for_s = max(wait_s, DEAD_HOST_S) if way_out else wait_s
            if time.monotonic() - begun >= wait_for_s:
                raise DataError(_in_use(subject, owner, advice) + way_out) from None
            if way_out and owner and not is_said:  # a moment after it is held, and longer over NFS, no owner is read
                print(f"note: {subject}: waiting up to {wait_for_s:.0f} s for {owner}{way_out}", file=sys.stderr)
                is_said = True
            time.sleep(POLL_S)
            continue
        except OSError as error:
            os.close(file)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            print(f"note: {subject} cannot be locked ({error.strerror}): let no other run write it", file=sys.stderr)
            return None
        if _stands_at(path, file):
            return file
        os.close(file)  # the one who held it has removed it


def _stands_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _in_use(subject: str, owner: str, advice: str) -> str:
    return f"{subject} is being written by {owner or 'another process'}; this is {_process()}. Wait for it, or {advice}"


def _process() -> str:
    return f"process {os.getpid()}{_here()}"


def _here() -> str:
    return f" on {socket.gethostname()}"
