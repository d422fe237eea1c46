"""The demo on the device, its students beside the same demo's on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.shapes import Shapes

ROOT = Path(__file__).resolve().parents[3]
ON_CPU = {
    "teacher": 1.0,
    "untouched": 0.19,
    "finetuned": 0.31,
    "teacher_answers": 0.836,
    "paper": 0.478,
    "interaction": 0.962,
}
"""Exact match of `make demo` with seed 0 on two CPU ranks, as README.md shows it."""


def run(report: Report, device: Device, shapes: Shapes, place: Path) -> None:
    """Raises CalledProcessError where the demo fails; its output is this process's own."""
    folder = place / "demo"
    begun = time.perf_counter()
    settings = {"DEVICE": device.kind, "RANKS": "1", "PLACE": str(folder)}
    settings |= {"SIZE": shapes.demo_size, "STUDENTS": " ".join(shapes.demo_students)}
    subprocess.run(["bash", "launch/demo.sh"], cwd=ROOT, env=os.environ | settings, check=True)
    report.add("whole demo", time.perf_counter() - begun, "s")
    evaluation = json.loads((folder / "runs/demo/evaluation.json").read_text("utf-8"))
    report.detail("evaluation", evaluation)
    for name in ("teacher", "untouched", *shapes.demo_students):
        beside = f"CPU, full size: {ON_CPU[name]:.1%}"
        report.add(f"exact match, {name}", 100 * evaluation[name]["exact_match"], "%", beside=beside)
