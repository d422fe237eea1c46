"""The page of all commands: what each prints with --help."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import data_prep.__main__
import launch.cache
import launch.preflight
import launch.submit
import launch.train
import pipeline.__main__

WIDTH = "100"
"""Columns of the help: argparse reads it from the environment."""
HEAD = """# Commands

What each command prints with `--help`. Installed without a checkout, the programs have other names:
[Installation](installation.md).
"""


def commands_page() -> str:
    """The page as Markdown, a heading for each command."""
    chapters = [f"\n## {title}\n\n{_block(main, arguments)}" for title, main, arguments in commands()]
    return HEAD + "".join(chapters)


def commands() -> Iterator[tuple[str, Callable[[list[str]], int], list[str]]]:
    """(the command as one types it, the program's main, its arguments)."""
    for name in ("shard", "lint", "preview"):
        yield f"python -m data_prep {name}", data_prep.__main__.main, [name]
    yield "deepspeed launch/train.py", launch.train.main, []
    yield "deepspeed launch/cache.py", launch.cache.main, []
    for name in pipeline.__main__.COMMANDS:
        yield f"python -m pipeline {name}", pipeline.__main__.main, [name]
    yield "python -m launch.submit", launch.submit.main, []
    yield "deepspeed launch/preflight.py", launch.preflight.main, []


def help_of(main: Callable[[list[str]], int], arguments: Sequence[str]) -> str:
    """What a program prints with --help. Raises RuntimeError where it prints nothing."""
    printed = io.StringIO()
    with patch.dict(os.environ, COLUMNS=WIDTH), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    if not printed.getvalue():
        raise RuntimeError(f"{main.__module__} {' '.join(arguments)} --help printed nothing")
    return printed.getvalue()


def _block(main: Callable[[list[str]], int], arguments: Sequence[str]) -> str:
    return f"```text\n{help_of(main, arguments)}```\n"
