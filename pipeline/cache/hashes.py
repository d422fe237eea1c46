"""Hashes of large files, made once: by one of the jobs that need them at a time, and remembered for all others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.lock import lock_file
from data_prep.schema import DataError
from data_prep.shards import write_file
from pipeline.errors import CacheError

IN_RUN = "sha256.json"
"""A run's own store, in its folder: its jobs share it on any machine, also where users' homes are not shared."""

WAIT_S = 3600.0
"""How long a job waits for another one that hashes the same files: 145 GB at 50 MB/s take 50 minutes. It is less than
what a rank may take for it unless hang_minutes is set lower: 80 minutes."""


class HashStore:
    """SHA-256 of files, remembered by path, size and time of change, for the user and for the jobs of a run.

    Of several processes that ask for the same unknown files, one hashes them and the others wait for it.
    """

    def __init__(self, run: Path | None = None):
        """run: a run folder, whose store is used beside the user's."""
        self._run = run

    def digests(self, files: Sequence[Path]) -> dict[Path, str]:
        """{file: SHA-256}. Raises OSError where one is missing."""
        stats = {file: file.stat() for file in files}
        keys = {file: f"{file.resolve()} {stats[file].st_size} {stats[file].st_mtime_ns}" for file in files}
        known = self._stored()
        if not known.keys() >= set(keys.values()):
            with self._alone(keys.values()):
                known = self._stored()  # another process may have hashed them while this one waited
                known |= self._hash([(file, key) for file, key in keys.items() if key not in known])
        return {file: known[key] for file, key in keys.items()}

    def _hash(self, unknown: Sequence[tuple[Path, str]]) -> dict[str, str]:
        if not unknown:
            return {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
            digests = list(pool.map(file_sha256, [file for file, _ in unknown]))
        new = dict(zip((key for _, key in unknown), digests, strict=True))
        for store in self._stores():
            _add(store, new)
        return new

    def _stores(self) -> list[Path]:
        """The run's first: its jobs surely share it."""
        stores = [self._run / IN_RUN] if self._run is not None else []
        with contextlib.suppress(RuntimeError):  # there is no home folder
            stores.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlsi" / "sha256.json")
        return stores

    def _stored(self) -> dict[str, str]:
        return {key: digest for store in self._stores() for key, digest in _read(store).items()}

    @contextlib.contextmanager
    def _alone(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold the lock of these files. Where there can be no lock, the only cost is to hash them twice."""
        name = f".{hashlib.sha256(''.join(sorted(keys)).encode()).hexdigest()[:16]}.lock"
        with contextlib.ExitStack() as held:
            for store in self._stores()[:1]:
                with contextlib.suppress(OSError, DataError):
                    store.parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(lock_file(store.with_name(name), "hashes of files", "-", WAIT_S))
            yield


def check_sha256(path: Path, expected: str | None, repair: str) -> str:
    """Read a file and compare; returns its SHA-256. Raises CacheError, which ends in `repair`, where it is gone or was
    changed.

    A disk that flips a bit changes neither size nor time, so what is remembered does not serve here. expected: None for
    a file from before its hash was kept.
    """
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        raise CacheError(f"{path} is gone. {repair}") from None
    if expected is not None and found != expected:
        raise CacheError(f"{path} is damaged: expected SHA-256 {expected}, found {found}. {repair}")
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of one file's bytes."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def _read(store: Path) -> dict[str, str]:
    try:
        stored = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # never written, or unreadable: hash again
        return {}
    return stored if isinstance(stored, dict) else {}


def _add(store: Path, new: Mapping[str, str]) -> None:
    """Add hashes to a store. Where it cannot be written, the only cost is to hash again next time."""
    with contextlib.suppress(OSError):
        write_file(store, json.dumps(_read(store) | dict(new)).encode())
