"""`make check-gpu`: the checks, cheapest first, each in a process with a time limit; one table, goal beside figure.

  OUT=DIR make check-gpu                on a CUDA machine: what fits into MINUTES (8); docs/check_gpu.md
  make check-gpu DEVICE=cpu             its twin: the same code with tiny shapes; its figures mean nothing

Each check writes OUT/NAME.json as it goes, OUT/table.md comes last. Exit code 1 if a check failed or ran out of time. A
goal that is missed is in the table, and no failure; a wrong number or a failed test is one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from rich.console import Console

from bench.gpu.jobs import ROOT, Ended, Job, left_out, run_together
from bench.gpu.plan import Check, checks_for
from bench.gpu.table import markdown, show

BUILD = ROOT / "build"


def environment(device: str) -> dict[str, str]:
    """Variables of the checks' processes: one device, nothing downloaded."""
    common = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        return common | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return common | {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": first, "TRITON_INTERPRET": "0"}


def has_cuda() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


def run_all(groups: list[list[Check]], device: str, out: Path, place: Path, end: float) -> list[Ended]:
    """Run the groups in turn until `end` (monotonic seconds). What is left out then has its reason."""
    done: list[Ended] = []
    try:
        for group in groups:
            left = end - time.monotonic()
            late = [check for check in group if check.needs_s > left]
            done += [left_out(check.name, f"{left:.0f} s are left, it needs {check.needs_s}") for check in late]
            jobs = [Job(check.name, _command(check, device, out, place), min(check.limit_s, left), _json(check, out))
                    for check in group if check not in late]  # fmt: skip
            done.extend(run_together(jobs, environment(device)))
    except KeyboardInterrupt:
        ran = {one.name for one in done}
        done += [left_out(check.name, "interrupted") for group in groups for check in group if check.name not in ran]
    return done


def _json(check: Check, out: Path) -> Path:
    return out / f"{check.name.replace(':', '-')}.json"


def _command(check: Check, device: str, out: Path, place: Path) -> list[str]:
    options = ["--device", device, "--output", str(_json(check, out)), "--place", str(place)]
    return [sys.executable, "-m", "bench.gpu.check", check.name, *options]


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the twin (default: cuda)")
    parser.add_argument("--out", type=Path, default=Path("build/check_gpu"), help="folder for JSON and table.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="checks that do not fit are left out (8)")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="some of the checks")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not has_cuda():
        parser.error("torch finds no CUDA device. The twin for a CPU: make check-gpu DEVICE=cpu")
    try:
        groups = checks_for(options.device, options.only)
    except ValueError as error:
        parser.error(str(error))
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)  # what stops us must stop the checks, and find the table
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for check in (check for group in groups for check in group):
        _json(check, out).unlink(missing_ok=True)  # of an earlier run: this one may leave the check out
    BUILD.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="check_gpu_", dir=BUILD) as place:  # models of 25 GB: on the checkout's disk
        done = run_all(groups, options.device, out, Path(place), begun + 60 * options.minutes)
    show(done, options.device, Console(width=None if sys.stdout.isatty() else 160))
    (out / "table.md").write_text(markdown(done, options.device, time.monotonic() - begun), "utf-8")
    print(f"written: {out}")
    return int(any(one.failed for one in done))
