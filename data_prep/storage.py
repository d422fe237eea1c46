"""Folders behind a URL: s3://bucket/shards, gs://..., https://..., or any other that fsspec knows.

Samples are read by range, each with its own request: the order in which samples are read is the same as from a disk.
Files are written whole: they are made on the local disk and uploaded, and an object store shows no half object.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from data_prep.schema import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

RETRY_S = 180.0
"""For how long a request is tried again: a store's short outage does not end a job, and a loader that gives nothing for
300 s would be taken for stuck."""
LONGEST_PAUSE_S = 20.0
PASSING = {408, 425, 429}
"""Answers of a web server below 500 that say: try again."""


def location(path: str | Path) -> Path:
    """A path, or the folder behind a URL, which has the methods of a path that are needed here.

    Raises DataError where the package that reads URLs is missing.
    """
    if not is_url(path):
        return Path(path)
    try:
        from upath import UPath
    except ImportError:
        raise DataError(
            f"{path} is a URL; reading it needs the extra `remote`: pip install -e '.[remote]' in the checkout"
        ) from None
    return cast(Path, UPath(path))


def location_argument(text: str) -> Path:
    """`location`, for a command line: an error stands beside the option's name."""
    try:
        return location(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_url(path: object) -> bool:
    """Whether it is, or names, something behind a URL."""
    return not isinstance(path, Path) and "://" in str(path)


def is_file(path: Path) -> bool:
    """Whether there is such a file. Raises DataError where a store does not answer."""
    return _retried(path, lambda: _store(path).isfile(str(path))) if is_url(path) else path.is_file()


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none. Raises DataError where a store does not answer."""
    try:
        return _retried(path, lambda: _store(path).size(str(path))) if is_url(path) else path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_bytes(path: Path) -> bytes:
    """A whole file, from a disk or a URL. Raises OSError, and DataError where a store does not answer."""
    return _retried(path, lambda: _store(path).cat_file(str(path))) if is_url(path) else path.read_bytes()


def listed(folder: Path, pattern: str = "**/*") -> dict[Path, int]:
    """{file: bytes} of the files below a folder whose path there matches, as they are now; of no folder none.

    Raises DataError where a store does not answer.
    """
    if is_url(folder):
        return _retried(folder, lambda: _listed(folder, pattern))
    found = {}
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if path.is_file():
                found[path] = path.stat().st_size
    return found


def modified(path: Path) -> float:
    """When a file was last written, in seconds; 0 where its store does not say. Raises DataError where it is silent."""
    if not is_url(path):
        return path.stat().st_mtime_ns / 1e9

    def ask() -> float:
        try:
            return _store(path).modified(str(path)).timestamp()
        except NotImplementedError:  # a web server's files
            return 0.0

    return _retried(path, ask)


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file on this machine: the file itself, or a copy of what is behind a URL, for as long as it is needed."""
    if not is_url(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="vlsi-download-") as copy:
        _retried(path, lambda: _store(path).get_file(str(path), copy.name))
        yield Path(copy.name)


class RemoteFiles:
    """Files of a folder behind a URL. Picklable, and used by any process: each has connections of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file. Raises FileNotFoundError, and DataError where the store fails."""
        path = self.folder / name

        def ask() -> bytes:
            content = _store(path).cat_file(str(path), start=offset, end=offset + size)
            if len(content) > size:
                raise DataError(f"{path}: samples are read as parts of this file, and its server sends only the whole")
            if len(content) < size:
                raise _CutOff(f"asked for {size} bytes at {offset}, got {len(content)}")
            return content

        return _retried(path, ask)


def remove(path: Path) -> None:
    """Remove a file. Raises OSError, and DataError where a store does not answer."""
    if is_url(path):
        _retried(path, lambda: _store(path).rm_file(str(path)))
    else:
        path.unlink()


class Upload:
    """A file that appears behind its URL when it is complete; as data_prep.atomic.AtomicFile."""

    def __init__(self, path: Path):
        self._path = path
        self._own = tempfile.NamedTemporaryFile(prefix="vlsi-upload-")  # noqa: SIM115  # closed by commit or discard
        self.file: BinaryIO = cast(BinaryIO, self._own)

    def commit(self) -> None:
        """Upload it. Raises DataError where the store fails, or may not be written."""
        self.file.flush()
        _retried(self._path, lambda: _store(self._path).put_file(self._own.name, str(self._path)))
        self.file.close()

    def discard(self) -> None:
        """Remove the local file."""
        with contextlib.suppress(OSError):
            self.file.close()


class _CutOff(OSError):
    """A store's answer ended early."""


def _listed(folder: Path, pattern: str) -> dict[Path, int]:
    store = _store(folder)
    store.invalidate_cache()  # it keeps listings for as long as the process lives, and other jobs write there
    entries = store.glob(f"{folder}/{pattern}", detail=True)
    files = {name: entry["size"] for name, entry in entries.items() if entry["type"] == "file"}
    return {location(store.unstrip_protocol(name)): size for name, size in files.items()}


def _store(path: Path) -> AbstractFileSystem:
    """The store's client, one for each process: fsspec makes another after a fork, where a path would keep the old."""
    import fsspec

    remote = cast(Any, path)
    try:
        return fsspec.filesystem(remote.protocol, **remote.storage_options)
    except ImportError as error:
        raise DataError(f"{path}: {error}") from None


def _retried(path: Path, ask: Callable[[], Result]) -> Result:
    """What the store answers, asked again after a fault that may pass, for RETRY_S.

    Raises FileNotFoundError as it is, DataError otherwise.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S),
        stop=stop_after_delay(RETRY_S),
        reraise=True,
    )
    try:
        return retrying(ask)
    except (FileNotFoundError, DataError):
        raise
    except Exception as error:
        tried = f" after {RETRY_S:.0f} s of trying" if _may_pass(error) else ""
        raise DataError(
            f"{path}: the store answers {type(error).__name__}: {error}{tried}. See whether it is reached from here "
            "and whether the credentials in this job's environment are for it; then run the same command again"
        ) from None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may be answered a little later: neither "no such file" nor "you may not"."""
    if isinstance(error, (FileNotFoundError, PermissionError, DataError)) or not isinstance(error, Exception):
        return False
    status = getattr(error, "status", None)  # of an HTTP answer
    return status is None or status >= 500 or status in PASSING
