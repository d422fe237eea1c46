"""The folders of a run's caches, found by name. No torch import here: `status` is called often and must be fast."""

from __future__ import annotations

from pathlib import Path

from data_prep.storage import listed, modified

IDENTITY = "cache.json"
"""The file that marks a folder as a cache. It is written first."""

ASIDE = ".old"
"""Name suffix of a cache folder that was moved aside. The run ignores such folders."""


def cache_folders(root: Path) -> list[Path]:
    """The caches under a run's cache folder that were not moved aside, in the order in which they were started."""
    files = [file for file in listed(root, f"*/{IDENTITY}") if not file.parent.name.endswith(ASIDE)]
    return [file.parent for file in sorted(files, key=modified)]


def newest(root: Path) -> Path | None:
    """The cache that was started last; None where there is none."""
    return next(reversed(cache_folders(root)), None)
