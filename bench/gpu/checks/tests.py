"""The tests marked `gpu`, on the device."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.shapes import Shapes

ROOT = Path(__file__).resolve().parents[3]
KERNEL = "tests/loss/test_softmax_kernel.py"
"""On a card without Triton's interpreter, in which the usual test run has it."""

ON_GPUS = "tests/results/test_on_gpus.py"


def run(report: Report, device: Device, shapes: Shapes, place: Path) -> None:
    """Raises RuntimeError where a test fails or none ran."""
    place.mkdir(parents=True, exist_ok=True)
    results = place / "tests.xml"
    results.unlink(missing_ok=True)
    where = ["tests/gpu", ON_GPUS, *([KERNEL] if device.is_cuda else [])]
    program = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "pytest_timeout",
        "-m",
        "gpu",
        f"--junitxml={results}",
        *where,
    ]
    # No other plugin that lies about on the machine.
    settings = {"GPU_TESTS_ON": device.kind, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    code = subprocess.run(program, cwd=ROOT, env=os.environ | settings, check=False).returncode
    if not results.is_file():
        raise RuntimeError(f"pytest ended with code {code} before it ran a test")
    suite = next(xml.parse(results).getroot().iter("testsuite")).attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    report.add("passed", passed)
    report.add("failed", failed, goal=("at most", 0))
    report.add("skipped", skipped)
    if code or not passed:
        raise RuntimeError(f"{failed} tests failed, {passed} passed (pytest's exit code {code})")
