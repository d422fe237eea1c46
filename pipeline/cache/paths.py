"""Where a run's caches lie, by their names alone: no torch here, `status` asks often."""

from __future__ import annotations

from pathlib import Path

IDENTITY = "cache.json"
"""What makes a folder a cache's: written before all else."""

ASIDE = ".old"
"""End of the name of a folder that was moved aside: no cache of the run any more."""


def cache_folders(root: Path) -> list[Path]:
    """The caches under RUN/cache that were not moved aside, the one begun last at the end."""
    files = [file for file in root.glob(f"*/{IDENTITY}") if not file.parent.name.endswith(ASIDE)]
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]


def newest(root: Path) -> Path | None:
    """The cache that was begun last; None where there is none."""
    return next(reversed(cache_folders(root)), None)
