"""vlsi-train and vlsi-cache: launch/train.py and launch/cache.py where there is no checkout.

    vlsi-train --stage 1 --recipe R
    vlsi-train --num_gpus 4 --stage 2 --recipe R
    srun bash LAUNCH/slurm/as_rank.sh vlsi-train --stage 2 --recipe R

Options that the program itself does not know go to DeepSpeed's launcher. Under another launcher (torchrun, mpirun, srun
with as_rank.sh, which sets RANK) the program runs as it is. LAUNCH is the folder of this file.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from launch import cache as cache_program
from launch import train as train_program

LAUNCHED = ("RANK", "OMPI_COMM_WORLD_RANK")
"""Set by launchers: DeepSpeed's, torchrun and scripts for srun set the first, mpirun the second."""


def train() -> int:
    """The program vlsi-train."""
    return _start(train_program, sys.argv[1:])


def cache() -> int:
    """The program vlsi-cache."""
    return _start(cache_program, sys.argv[1:])


def command(program: ModuleType, arguments: Sequence[str]) -> list[str]:
    """The command line of DeepSpeed's launcher, its own options before the script and the program's behind it."""
    _, unknown = program.parser().parse_known_args(arguments)
    own, rest = [], list(unknown)
    for argument in arguments:
        if rest and argument == rest[0]:
            rest.pop(0)
        else:
            own.append(argument)
    program.parse(own)
    beside = Path(sys.executable).with_name("deepspeed")
    launcher = str(beside) if beside.is_file() else shutil.which("deepspeed") or "deepspeed"
    return [launcher, *unknown, str(Path(program.__file__ or "").resolve()), *own]


def _start(program: ModuleType, arguments: Sequence[str]) -> int:
    if any(name in os.environ for name in LAUNCHED):
        return program.main(list(arguments))
    if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:  # of srun; not set in a batch script itself
        return _refuse_bare_tasks(tasks, arguments)
    line = command(program, arguments)
    os.execvp(line[0], line)


def _refuse_bare_tasks(tasks: int, arguments: Sequence[str]) -> int:
    """The exit code of each of srun's tasks; the first says why."""
    if os.environ.get("SLURM_PROCID", "0") == "0":
        as_rank = Path(__file__).resolve().parent / "slurm" / "as_rank.sh"
        own = shlex.join([Path(sys.argv[0]).name, *arguments])
        print(
            f"error: expected RANK in the environment of each of srun's {tasks} tasks, found none: each would start "
            f"ranks of its own. Run: srun bash {as_rank} {own}",
            file=sys.stderr,
        )
    return 2
