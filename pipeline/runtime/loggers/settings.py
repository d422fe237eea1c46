"""What a logger tells of a run besides its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def recipe_of(run: Path) -> dict[str, Any]:
    """The recipe that rank 0 has written into the run's folder, to compare runs by; empty where there is none."""
    path = run / "recipe.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
