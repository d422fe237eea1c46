"""A rank's launcher: when it is gone, the rank ends too.

Launchers end their ranks when they fail, and when they are asked to end. Killed outright (SIGKILL, out of memory) they
leave them behind: these would train on, hold their GPUs, and write what the next start of the job writes too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import PurePath

import psutil

LAUNCHERS = {
    "deepspeed",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "mpirun",
    "mpiexec",
    "orted",
}
"""Programs and modules that start ranks and stay until these end."""
POLL_S = 1.0
ORPHANED = 1
"""Exit code of a rank whose launcher is gone."""


def end_with_the_launcher() -> None:
    """End this process soon after a launcher among its ancestors has ended. Does nothing where there is none."""
    if ancestors := launchers(psutil.Process()):
        threading.Thread(target=_watch, args=(ancestors,), daemon=True, name="launcher").start()


def launchers(process: psutil.Process) -> list[psutil.Process]:
    """The nearest ancestors without a gap that are launchers: DeepSpeed has one a node, started by another.

    What started them (a shell, ssh, a batch system) may end before them: that ends no rank.
    """
    found = []
    for ancestor in process.parents():
        if not is_launcher(_command_line(ancestor)):
            break
        found.append(ancestor)
    return found


def is_launcher(command: list[str]) -> bool:
    """Whether a command line starts a launcher: mpirun ..., python /bin/deepspeed ..., python -u -m torch...run ..."""
    words = iter(command)
    program = PurePath(next(words, "")).name
    if not program.startswith("python"):
        return program in LAUNCHERS
    script = next((word for word in words if word == "-m" or not word.startswith("-")), "")
    return (next(words, "") if script == "-m" else PurePath(script).name) in LAUNCHERS


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended, or belongs to someone else
        return []


def _watch(ancestors: list[psutil.Process]) -> None:
    while all(map(_is_alive, ancestors)):
        time.sleep(POLL_S)
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank}: its launcher is gone, so it ends too; the same command goes on from the last checkpoint",
          file=sys.stderr, flush=True)  # fmt: skip
    os._exit(ORPHANED)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
