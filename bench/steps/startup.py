"""Time of `launch/train.py --stage 2` from the command to the end of the first update, by phase."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.recipe.resolve import load_recipe

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3


def one_rank() -> dict[str, str]:
    """Environment variables of a job's only rank, for a process that no launcher starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def train(*arguments: str) -> None:
    """Run launch/train.py on one rank, to its end. If it fails, prints its output and raises CalledProcessError."""
    _run([sys.executable, "launch/train.py", *arguments], one_rank())


def start_up(recipe: Path) -> dict[str, Any]:
    """Wall seconds and CPU seconds of the rank for each phase, under DeepSpeed's launcher."""
    with TemporaryDirectory() as folder:
        stamps = [_start(recipe, Path(folder) / f"{number}.json") for number in range(ROUNDS)]
    phases = list(stamps[0])[1:]
    spans = {phase: _spans(stamps, before, phase) for before, phase in zip(stamps[0], phases, strict=False)}
    total = statistics.median(one[phases[-1]][0] - one["command"][0] for one in stamps)
    return {"rounds": ROUNDS, "wall_s": round(total, 2), "phases": spans}


def _spans(stamps: list[dict[str, list[float]]], before: str, phase: str) -> dict[str, float]:
    wall, cpu = (statistics.median(one[phase][i] - one[before][i] for one in stamps) for i in (0, 1))
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


def _start(recipe: Path, stamps: Path) -> dict[str, list[float]]:
    shutil.rmtree(load_recipe(recipe).recipe.run / "interact", ignore_errors=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = ["--include", f"localhost:{visible.split(',')[0]}"] if visible else ["--num_accelerators", "1"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", *device]
    port = ["--master_port", one_rank()["MASTER_PORT"]]
    begun = time.clock_gettime(time.CLOCK_BOOTTIME)
    _run(
        [*launcher, *port, "bench/steps/startup_probe.py", "--stage", "2", "--recipe", str(recipe)],
        {"STAMPS": str(stamps)},
    )
    return {"command": [begun, 0.0], **json.loads(stamps.read_text("utf-8"))}


def _run(command: list[str], environment: dict[str, str]) -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in one_rank()}
    done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        done.check_returncode()
