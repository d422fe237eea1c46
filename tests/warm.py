"""Programs of the checkout in processes that have imported the large packages already: forked, not started.

torch, transformers and DeepSpeed take 4.5 s of a core to import, in each rank of each run: a third of the tests' time.
One process of a test session imports them, and starts nothing. Each program runs in a fork of it, with an environment,
arguments and output of its own, to the exit code that it would have.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

PACKAGES = ["torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto", "deepspeed"]
"""What is imported beforehand. Nothing of the project: a program imports that itself."""


def start(program: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path) -> BaseProcess:
    """Start `python PROGRAM...` (a file, or -m and a module) in a folder; what it prints is appended to `output`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PACKAGES)
    process = context.Process(target=_run, args=(list(program), str(folder), dict(environment), str(output)))
    before = dict(os.environ)
    os.environ.update(environment)  # the packages are imported under it, by the first start of the session
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _run(program: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    multiprocessing.set_start_method(None, force=True)  # the program's own processes start as they would anywhere
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]  # as python -u
    try:
        _run_as_main(program)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def _run_as_main(program: list[str]) -> None:
    """As the interpreter does it: sys.argv, and the program's folder first on the path."""
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        runpy.run_path(program[0], run_name="__main__")
