"""Ranks end with their launcher, and with nothing else."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.runtime.launcher import is_launcher, launchers

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import time
from pipeline.runtime import launcher
launcher.GRACE_S = 1.0
launcher.end_with_the_launcher()
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "command",
    [
        "/opt/bin/python3.11 /opt/bin/deepspeed --num_gpus 8 launch/train.py",
        "/opt/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=e30= launch/train.py",
        "python -m torch.distributed.run --nproc_per_node 2 launch/train.py",
        "/usr/bin/python3 -u /usr/local/bin/torchrun launch/train.py",
        "mpirun -n 2 python launch/train.py",
        "/usr/bin/orted -mca ess env",
        "/usr/bin/prted --prtemca ess env",
    ],
)
def test_launchers_are_known_by_their_program(command):
    assert is_launcher(command.split())


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash -c deepspeed\\ launch/train.py",
        "python launch/train.py --stage 1",
        "python -m pytest tests/deepspeed",
        "sshd: someone [priv]",
        "slurmstepd: [7.0]",
        "nano deepspeed",
        "python",
        "python -m",
    ],
)
def test_what_may_end_before_its_ranks_is_none(command):
    assert not is_launcher(command.split())


def start_under(tmp_path: Path, program: str) -> tuple[subprocess.Popen, psutil.Process]:
    """A program of that name, which starts a rank and waits for it; and the rank."""
    script = tmp_path / program
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {RANK!r}])\n")
    started = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None and started.stdout.readline() == b"up\n"
    (rank,) = psutil.Process(started.pid).children()
    return started, rank


@pytest.mark.parametrize(("program", "ends"), [("deepspeed", True), ("somewhere", False)])
def test_a_rank_ends_when_its_launcher_is_killed(tmp_path, program, ends):
    launcher, rank = start_under(tmp_path, program)
    assert [one.pid for one in launchers(rank)] == ([launcher.pid] if ends else [])
    try:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        gone, _ = psutil.wait_procs([rank], timeout=20 if ends else 3)
        assert bool(gone) == ends
        if ends:
            assert launcher.stderr is not None
            assert b"rank 0: its launcher is gone, so it stops too" in launcher.stderr.read()
    finally:
        if rank.is_running():
            rank.kill()
        for pipe in (launcher.stdout, launcher.stderr):
            pipe.close()  # type: ignore[union-attr]


def test_a_process_without_launcher_is_left_alone():
    assert launchers(psutil.Process(os.getpid())) == []


@pytest.fixture
def mpirun():
    """Run a program as two ranks; returns how it ended."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.is_file() else shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun: pip install -e '.[mpi]'")
    root = {"RANK": "0", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def run(rank: str) -> subprocess.CompletedProcess[str]:
        command = [program, "-n", "2", "--oversubscribe", sys.executable, "-c", rank]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | root, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.mark.parametrize("code", [0, 75])
def test_mpirun_ends_with_the_code_its_ranks_leave_with(mpirun, code):
    """Ranks that had called MPI_Init and left by os._exit(0) were taken for failed: mpirun ended with 1."""
    done = mpirun(f"from mpi4py import MPI; from pipeline.runtime.launcher import leave; leave({code})")
    assert done.returncode == code, done.stderr


def test_a_rank_knows_the_mpirun_that_is_installed(mpirun):
    """Open MPI 5's is prterun by the time its ranks look: they watched no launcher at all."""
    look = "from pipeline.runtime.launcher import launchers; import psutil; print(len(launchers(psutil.Process())))"
    done = mpirun(look)
    assert done.stdout.split() == ["1", "1"], done.stdout + done.stderr
