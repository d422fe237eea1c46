"""What is measured or said by other processes: transformers' Trainer, and `python -m pipeline plan`.

Each gives its figures, or the reason why there are none: a comparison that is missing must not end the check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu.device import Device
from bench.steps.startup import one_rank

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 180


def trainer_seconds(recipe: Path, updates: int, device: Device, place: Path) -> float | str:
    """Seconds of an update of transformers' Trainer on the recipe's student and first micro-batch; or why not."""
    output = place / "trainer.json"
    output.unlink(missing_ok=True)
    options = ["--recipe", str(recipe), "--updates", str(updates), "--device", device.kind, "--output", str(output)]
    error = _run(["-m", "bench.gpu.trainer", *options])[1]
    return error or float(json.loads(output.read_text("utf-8"))["seconds"])


def planned_bytes(recipe: Path, memory_bytes: int) -> dict[str, int] | str:
    """{step: bytes on one GPU} by `plan`; or why not, such as that there is no such command."""
    machine = ["--gpus", "1", "--gpu-memory", str(memory_bytes // 10**9)]
    said, error = _run(["-m", "pipeline", "plan", "--recipe", str(recipe), *machine, "--json"])
    return error or {step["step"]: int(step["memory"]["total"]) for step in json.loads(said)["steps"]}


def _run(arguments: list[str]) -> tuple[str, str]:
    """(what `python ...` printed, why it failed: "" where it did not). It is told of no other rank."""
    alone = {key: value for key, value in os.environ.items() if key not in one_rank()}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return "", f"it took more than {LIMIT_S} s"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout, f"exit code {done.returncode}: {last[-300:]}" if done.returncode else ""
