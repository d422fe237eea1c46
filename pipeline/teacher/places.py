"""Where a run's caches lie, by their names alone: no torch here, `status` asks often."""

from __future__ import annotations

from pathlib import Path

IDENTITY = "cache.json"
"""What makes a folder a cache's: written before all else."""


def cache_folders(root: Path) -> list[Path]:
    """The caches under RUN/cache, the one begun last at the end."""
    return [file.parent for file in sorted(root.glob(f"*/{IDENTITY}"), key=lambda file: file.stat().st_mtime_ns)]


def newest(root: Path) -> Path | None:
    """The cache that was begun last; None where there is none."""
    return next(reversed(cache_folders(root)), None)
