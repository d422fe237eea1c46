"""Write recipes for tests about recipes."""

from __future__ import annotations

from pathlib import Path

import yaml

STEPS = ("verbalize", "cache", "interact", "reinforce")


def write(tmp_path: Path, values: dict) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
