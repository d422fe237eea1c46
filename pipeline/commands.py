"""Commands that messages advise: as typed in a checkout, or elsewhere with the installed programs."""

from __future__ import annotations

import shlex
from pathlib import Path

CHECKOUT = (Path(__file__).parents[1] / "setup.cfg").is_file()


def train_command(stage: int, recipe: Path | str, *more: str) -> str:
    """The command that runs a stage of a recipe; `more` are further arguments, quoted for the shell where needed."""
    return _command("train", "--stage", str(stage), "--recipe", str(recipe), *more)


def cache_command(recipe: Path | str, *more: str) -> str:
    """The command that makes a teacher cache, or its missing part."""
    return _command("cache", "--recipe", str(recipe), *more)


def _command(program: str, *arguments: str) -> str:
    start = f"deepspeed launch/{program}.py" if CHECKOUT else f"vlsi-{program}"
    return f"{start} {shlex.join(arguments)}"
