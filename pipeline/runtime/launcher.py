"""A rank and its launcher: how a rank leaves, and that it stops too when its launcher is gone.

Launchers end their ranks when they fail, and when they are asked to end. Killed outright (SIGKILL, out of memory, and
`deepspeed` by a SIGTERM) they leave them behind: these would train on, hold their GPUs, and write what the next start
of the job writes too. They are asked to stop as by a signal, so that the work since the last checkpoint is kept.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import PurePath

import psutil

from pipeline.runtime.faults.stop import LAUNCHER_GONE, ask_to_stop

LAUNCHERS = {
    "deepspeed",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "mpirun",
    "mpiexec",
    "orted",
    "prterun",
    "prted",
}
"""Programs and modules that start ranks and stay until these end. Open MPI 5's mpirun becomes prterun; on other hosts
prted starts them, before version 5 orted."""
POLL_S = 1.0
GRACE_S = 60.0
"""How long a rank without launcher has for the end of its update and a checkpoint."""
ORPHANED = 1
"""Exit code of a rank whose launcher is gone, and that could not stop in GRACE_S."""


def leave(code: int) -> int:
    """End the process at once under a launcher; elsewhere return the exit code.

    After a failure other ranks may be waiting in a collective for this one. After success, a thread of the
    communication library now and then outlives the process group and aborts the interpreter on its way out ("terminate
    called without an active exception", seen on gloo): all work is done by then, but the next job would not start.
    Under mpirun a rank that succeeds takes its leave of MPI first: mpirun takes one that does not for a failure.
    """
    if "RANK" not in os.environ:
        return code
    mpi = sys.modules.get("mpi4py.MPI")
    if code == 0 and mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_the_launcher() -> None:
    """Ask this process to stop once a launcher among its ancestors has ended, and end it GRACE_S later.

    Does nothing where there is none.
    """
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
    print(f"rank {rank}: its launcher is gone, so it stops too; the same command goes on from the last checkpoint",
          file=sys.stderr, flush=True)  # fmt: skip
    ask_to_stop(LAUNCHER_GONE)
    time.sleep(GRACE_S)
    os._exit(ORPHANED)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
