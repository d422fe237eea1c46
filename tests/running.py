"""Run the real programs on tiny models: recipes as dicts, processes under the deepspeed launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import warm
import yaml

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 240


def tiny_recipe(folder: Path, models: dict, kind: str, train: Path, zero: str = "zero3_cpu", **sections: Any) -> Path:
    """A recipe of a few updates a step; sections override or add, as in interact={"steps": 3}."""
    training = {"steps": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 3e-3}
    recipe: dict[str, Any] = {
        "run": str(folder / "run"),
        "precision": "fp32",
        "report": False,
        "deepspeed": str(ROOT / "ds_configs" / f"{zero}.json"),
        "data": {"train": str(train), "workers": 0},
        "teacher": {"path": str(models[kind, "teacher"]), "layers": [1, 2, 3, 4]},
        "student": {"path": str(models[kind, "student"]), "layers": [1, 2]},
        "verbalize": dict(training),
        "cache": {"codec": {"name": "sampled", "points": 16}, "batch_tokens": 512},
        "interact": dict(training),
        "reinforce": dict(training),
    }
    for name, value in sections.items():
        if isinstance(value, dict):
            recipe[name] |= value
        else:
            recipe[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def cache_folder(run: Path) -> Path:
    """The one teacher cache of a run."""
    (path,) = (file.parent for file in (run / "cache").glob("*/cache.json"))
    return path


def deepspeed(ranks: int, script: str, *arguments: object, check: int | None = 0, launcher: bool = False) -> str:
    """Run a program of launch/ on so many ranks; returns what they printed. `check`: the expected exit code.

    launcher: under DeepSpeed's own launcher. Without it the ranks get the environment that the launcher would set, and
    the others are ended when one fails, as it does: this saves its four seconds.
    """
    program = _program(script, arguments)
    port = str(free_port())
    if not launcher and _on_cpu():
        return _warm([_rank(rank, ranks, port) for rank in range(ranks)], program, check)
    if not launcher:
        return _on_ranks(ranks, port, program, check)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:ranks]  # --num_accelerators ignores it
    which = ["--include", f"localhost:{','.join(visible)}"] if visible[0] else ["--num_accelerators", str(ranks)]
    start = [_beside("deepspeed"), "-q", *which]
    return run([*start, "--master_port", port, *program], check)


def torchrun(ranks: int, script: str, *arguments: object) -> str:
    """The same under torchrun."""
    return run(
        [_beside("torchrun"), f"--nproc-per-node={ranks}", f"--master-port={free_port()}", *_program(script, arguments)]
    )


def mpirun(ranks: int, script: str, *arguments: object) -> str:
    """The same under mpirun. It gives each rank a terminal, on which progress would move: TERM says that it cannot."""
    return run(
        [
            _beside("mpirun"),
            "-n",
            str(ranks),
            "--oversubscribe",
            "-x",
            "TERM=dumb",
            sys.executable,
            *_program(script, arguments),
        ]
    )


def _beside(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _program(script: str, arguments: Sequence[object]) -> list[str]:
    return [f"launch/{script}", *map(str, arguments)]


def python(*arguments: object, check: int | None = 0) -> str:
    """Run `python ...` in the checkout; returns what it printed."""
    if arguments[0] != "-m" or not _on_cpu():
        return run([sys.executable, *map(str, arguments)], check)
    return _warm([{}], [str(argument) for argument in arguments], check)


def run(program: list[str], check: int | None = 0) -> str:
    """Run a program to its end, within four minutes; where the exit code is another, its output is in the failure."""
    done = subprocess.run(program, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=LIMIT_S)
    return _checked(done.returncode, done.stdout + done.stderr, check)


def _on_ranks(ranks: int, port: str, program: list[str], check: int | None) -> str:
    with tempfile.TemporaryFile("w+") as output:
        code = _wait(start_ranks(ranks, port, program, output))
        output.seek(0)
        return _checked(code, output.read(), check)


def _warm(environments: Sequence[Mapping[str, str]], program: list[str], check: int | None) -> str:
    """A program in one process for each environment, all with the large packages imported already."""
    with tempfile.NamedTemporaryFile("r") as output:
        started = [warm.start(program, ROOT, _environment() | own, Path(output.name)) for own in environments]
        code = _wait([_Forked(process, program) for process in started])
        return _checked(code, output.read(), check)


def _on_cpu() -> bool:
    return _environment()["DS_ACCELERATOR"] == "cpu"  # CUDA's state does not outlive a fork


class _Forked:
    """A forked process, with the methods of subprocess.Popen that are used here."""

    def __init__(self, process: BaseProcess, program: list[str]):
        self.args, self._process = program, process
        self.kill, self.wait = process.kill, process.join

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode


def _rank(rank: int, ranks: int, port: str) -> dict[str, str]:
    """What DeepSpeed's launcher sets in a rank's environment."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start_ranks(ranks: int, port: str, program: list[str], output: IO[str]) -> list[subprocess.Popen]:
    """Start a program of the checkout on so many ranks, and leave them to the caller."""
    return [
        subprocess.Popen(
            [sys.executable, "-u", program[0], f"--local_rank={rank}", *program[1:]],
            cwd=ROOT, env=_environment() | _rank(rank, ranks, port),
            stdout=output, stderr=output,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def _wait(processes: Sequence[subprocess.Popen | _Forked]) -> int:
    """The exit code of the first process that fails, which ends the others; 0 where all succeed."""
    end = time.monotonic() + LIMIT_S
    try:
        while any(process.poll() is None for process in processes):
            if failed := [process.returncode for process in processes if process.poll()]:
                return failed[0]
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired([str(process.args) for process in processes], LIMIT_S)
            time.sleep(0.05)
        return next((process.returncode for process in processes if process.returncode), 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _checked(code: int, output: str, check: int | None) -> str:
    # DeepSpeed's launcher turns every failure of a rank into its own exit code, so any non-zero stands for any other.
    if check is not None:
        assert bool(code) == bool(check), f"exit code {code}\n{output[-6000:]}"
    return output


def _environment() -> dict[str, str]:
    # The venv's own ninja and mpirun first, whatever shell the tests were started from.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.setdefault("DS_ACCELERATOR", "cpu")
    return env | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make`, as if no other make had started the tests: what their own was told, as ARGS=, is not for this one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=own, capture_output=True, text=True, check=False)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
