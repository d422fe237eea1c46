"""A disk of a few kilobytes, mounted for a test: really full, or really read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A mounted tmpfs."""

    def __init__(self, path: Path):
        self.path = path

    def resize(self, kilobytes: int) -> None:
        self._remount(f"size={kilobytes}k")

    def allow_writing(self, allowed: bool) -> None:
        self._remount("rw" if allowed else "ro")

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.path)) for file in self.path.rglob("*") if file.is_file())

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True)


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Disk]:
    """Skips where this process may not mount: that takes root."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount here: a disk cannot be filled")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here, which takes root: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
