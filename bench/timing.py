"""Timing and memory measurement of the benchmarks.

All forms that are compared run in turn in one process. Ratios are medians over the rounds. On a shared machine another
program slows a whole round, not one side of a ratio. Seconds are reported beside the ratios, but only seconds of the
same round may be compared. Every form runs once before it is timed. Every second round runs in reverse order, so that
no form always runs after the same other form.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine, its load, torch's version and the date of a measurement."""
    with open("/proc/meminfo") as file:
        kib = int(file.readline().split()[1])
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {kib / 2**20:.0f} GiB",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def interleaved(forms: Mapping[str, Callable[[], object]], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """Wall seconds of each form in each round; the forms of a round run one after the other.

    warm: every form has already run once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values() if not warm else ():
        form()
    for number in range(rounds):
        for name in list(forms)[:: -1 if number % 2 else 1]:
            _finish()
            start = time.perf_counter()
            forms[name]()
            _finish()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _finish() -> None:
    """Wait until the accelerator has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of the ratio of two forms' seconds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """Peak growth of memory, in MiB, while the callable returned by `prepare` runs.

    On a CPU: resident memory of a fresh process, so that no other form has left memory behind; `prepare` must be
    importable there. The kernel records the peak (VmHWM), which is reset after the inputs exist, so no sampling is
    needed. On an accelerator: memory allocated by torch.
    """
    if torch.cuda.is_available():
        return _allocated_peak_mib(prepare())
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prepare, sending))
    process.start()
    sending.close()
    grown = receiving.recv()  # EOFError if the process died
    process.join()
    return grown


def _allocated_peak_mib(form: Callable[[], object]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form()
    _finish()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _measure(prepare: Callable[[], Callable[[], object]], sending: Any) -> None:
    form = prepare()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    form()
    sending.send(_status_mib("VmHWM") - before)


def _status_mib(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":")) / 1024


def read_results(name: str) -> dict[str, Any]:
    """What bench/results/NAME.json holds; empty where there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write bench/results/NAME.json and return its path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
