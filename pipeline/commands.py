"""The commands that error messages suggest: the form for a checkout or for the installed programs."""

from __future__ import annotations

import shlex
from pathlib import Path

CHECKOUT = (Path(__file__).parents[1] / "setup.cfg").is_file()
"""Whether this code runs from a checkout; otherwise from an installed package."""


def train_command(stage: int, recipe: Path | str, *more: str) -> str:
    """The command that runs a stage of a recipe. `more`: further arguments. All arguments are quoted for a shell."""
    return _command("train", "--stage", str(stage), "--recipe", str(recipe), *more)


def cache_command(recipe: Path | str, *more: str) -> str:
    """The command that builds a teacher cache, or its missing parts. `more`: further arguments."""
    return _command("cache", "--recipe", str(recipe), *more)


def _command(program: str, *arguments: str) -> str:
    start = f"deepspeed launch/{program}.py" if CHECKOUT else f"vlsi-{program}"
    return f"{start} {shlex.join(arguments)}"
