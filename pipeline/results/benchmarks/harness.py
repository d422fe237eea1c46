"""lmms-eval as a program: whether it is there, in which versions, and the command line of one benchmark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RecipeError
from pipeline.results.benchmarks.columns import Benchmark
from pipeline.results.workers import Machine

PACKAGES = ("lmms-eval", "torch", "torchvision", "transformers", "accelerate", "datasets")
_ASK = f"""
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({{name: version(name) for name in {PACKAGES!r}}}))
"""


@dataclass(frozen=True)
class Place:
    """Where one run of lmms-eval works."""

    processes: int
    """Copies of the model, one for each of the first so many GPUs."""
    device_map: str
    """Where one copy goes: "cpu", "cuda" for one GPU, or "auto" for all of them together."""


@dataclass(frozen=True)
class Settings:
    """What is asked of lmms-eval for every model and benchmark."""

    python: Path
    """The interpreter that has lmms-eval."""
    include_path: Path | None = None
    """Folder of further tasks."""
    limit: int | None = None
    """Read only the first so many samples of each task."""
    batch_size: int = 1


def versions(python: Path) -> dict[str, str | None]:
    """{package: version} of an interpreter's environment. Raises RecipeError where it has no lmms-eval."""
    try:
        asked = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RecipeError(f"--eval-python {python} is no Python interpreter that runs: {error}") from None
    found = json.loads(asked.stdout)
    missing = [name for name in PACKAGES if found[name] is None]
    if missing:
        raise RecipeError(
            f"--benchmarks needs lmms-eval, and {python} has no {', '.join(missing)}. Install the extra `eval` "
            "(pip install -e '.[eval]' in the checkout), or name the interpreter of an "
            "environment that has them: --eval-python PATH (docs/benchmarks.md)"
        )
    return found


def place(folder: Path, processes: int | None) -> Place:
    """Where a model runs here: as many copies as `processes` and the GPUs allow. Raises RecipeError without room."""
    gpus = torch.cuda.device_count()
    if not gpus:
        if processes not in (None, 1):
            raise RecipeError(f"--processes {processes}: lmms-eval runs several only on GPUs, and there is none")
        Machine().groups(folder, 1)
        return Place(1, "cpu")
    if gpus == 1 and processes in (None, 1):
        return Place(1, "cuda")  # to ask for free memory would take some of the only GPU
    groups = Machine().groups(folder, processes)
    if all(len(group) == 1 for group in groups):
        return Place(len(groups), "cuda")
    return Place(1, "auto")


def command(
    settings: Settings, model: str, arguments: Mapping[str, Any], benchmark: Benchmark, where: Place, output: Path
) -> list[str]:
    """The command line of one benchmark; model: lmms-eval's class, with its arguments.

    Several processes are started by accelerate's launcher, as lmms-eval documents; its classes then choose their GPUs
    by themselves.
    """
    program = [str(settings.python), "-m", "lmms_eval"]
    if where.processes > 1:
        program = [
            str(settings.python), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
            "--num_processes", str(where.processes), "--main_process_port", "0", "--mixed_precision", "no",
            "--dynamo_backend", "no", "-m", "lmms_eval",
        ]  # fmt: skip
    else:
        arguments = {**arguments, "device_map": where.device_map}
    options = {
        "--model": model,
        "--model_args": ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks": benchmark.task,
        "--batch_size": settings.batch_size,
        "--device": "cpu" if where.device_map == "cpu" else "cuda",
        "--output_path": output,
        "--include_path": settings.include_path,
        "--limit": settings.limit,
        "--gen_kwargs": "temperature=0" if benchmark.greedy else None,
    }
    words = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    return [*program, *words, "--log_samples"]


def run_to_log(words: Sequence[str], log: Path) -> int:
    """The exit code of a command whose output goes to a file.

    Whatever ends this process first (Ctrl-C, SIGTERM of a batch system) ends the command too, with the processes that
    it started: they hold GPUs.
    """
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def this_python() -> Path:
    """The interpreter that runs this program."""
    return Path(sys.executable)
