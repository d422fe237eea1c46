"""The steps of one pair at its true size: ratios to plain work, utilisation, memory, data wait, and a profile of each.

The calls are those of bench.steps, timed in turn in this process on one rank. Random weights cost what trained ones do.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.checks.card import product_rate
from bench.gpu.checks.prepare import prepared_recipe
from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.peers import planned_bytes, trainer_seconds
from bench.gpu.profiles import profiled
from bench.gpu.shapes import Shapes
from bench.steps.measures import RATIOS, data_wait, operations_of
from bench.steps.ratios import PreparedRun, TimedCalls, cache_passes, sizes, student_steps, verbalize_steps
from bench.steps.startup import one_rank
from bench.timing import interleaved, ratio
from pipeline.runtime import engine
from pipeline.runtime.logs import filter_logs

GOALS = {
    "interact_over_finetune": ("at most", 1.15),
    "verbalize_over_forwards": ("at most", 1.15),
    "cache_speed_over_forward": ("at least", 0.9),
}
MAX_DATA_WAIT = 2.0
"""Percent of stage 2's time."""
IN_PUBLIC = "packed finetuning of Qwen2.5-VL-7B in public (lmms-engine): 30 to 40 %"
PLANNED = {"interact": "interact", "verbalize": "verbalize", "cache": "cache"}
"""{timed call: the step of `plan` that it is}. "finetune" here also holds the verbalizers."""


class Measured:
    """Seconds by round, operations, and peak bytes of each call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.operations: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def rate(self, name: str) -> float:
        """Operations a second."""
        return self.operations[name] / statistics.median(self.seconds[name])


def run(report: Report, device: Device, shapes: Shapes, place: Path, pair: str) -> None:
    """The ratios come first, what needs further processes last."""
    filter_logs()
    recipe = prepared_recipe(place, pair)
    peak = device.peak_rate() or product_rate(device, shapes.product)
    report.detail("peak_operations_a_second", peak)
    measured, make = Measured(), partial(_rounds, report, device, shapes.step_rounds)
    os.environ |= one_rank()
    ranks = engine.start()
    report.detail("sizes", sizes(PreparedRun(recipe, ranks)))
    make(measured, lambda: student_steps(PreparedRun(recipe, ranks), live=False))
    _add_ratio(report, measured, "interact_over_finetune")
    make(measured, lambda: verbalize_steps(PreparedRun(recipe, ranks)))
    _add_ratio(report, measured, "verbalize_over_forwards")
    make(measured, lambda: cache_passes(PreparedRun(recipe, ranks), place / pair / "written"))
    _add_ratio(report, measured, "cache_speed_over_forward")
    _add_ratio(report, measured, "cache_speed_over_forward_and_heads")
    engine.stop()
    _add_utilisation(report, measured, peak, trainer_seconds(recipe, shapes.updates, device, place / pair))
    _add_memory(report, measured, planned_bytes(recipe, device.memory_bytes()))
    workers = max(1, min(8, (os.cpu_count() or 2) - 2))
    waited = 100 * data_wait(recipe, workers, shapes.updates)
    report.add("data wait", waited, "%", ("under", MAX_DATA_WAIT), f"{workers} loader workers")


def _rounds(report: Report, device: Device, rounds: int, measured: Measured, make: Callable[[], TimedCalls]) -> None:
    """Build the calls; count each one's operations and memory in its first run; time them in turn; profile each.

    Memory is what came on top of what was in use before they were built.
    """
    device.free_memory()
    before = device.used_bytes()
    calls = make()
    for name, call in calls.items():
        device.reset_peak()
        measured.operations[name] = operations_of(call)
        device.wait()
        measured.peak_bytes[name] = device.peak_bytes() - before
    measured.seconds |= interleaved(calls, rounds, warm=True)
    for name, call in calls.items():
        seconds = statistics.median(measured.seconds[name])
        entry = {"seconds": seconds, "operations": measured.operations[name], "by_round": measured.seconds[name]}
        report.detail(name, {**entry, "profile": (found := profiled(device, call, seconds))})
        report.add(f"{name}: idle", 100 * found["idle_share"], "%", beside=f"{1e3 * seconds:.1f} ms a call")
    del calls, call
    device.free_memory()


def _add_ratio(report: Report, measured: Measured, name: str) -> None:
    above, below = RATIOS[name]
    by_operations = measured.operations[above] / measured.operations[below]
    value = ratio(measured.seconds[above], measured.seconds[below])
    report.add(name.replace("_", " "), value, goal=GOALS.get(name), beside=f"by operations {by_operations:.2f}")


def _add_utilisation(report: Report, measured: Measured, peak: float, trainer: float | str) -> None:
    """Operations in matrix products a second over the peak: of finetuning, of Trainer, of the teacher's forward.

    Trainer's time is held against the same operations as ours, whatever it computes beyond them.
    """
    finetune = measured.operations["finetune"]
    report.add("finetune: utilisation", 100 * measured.rate("finetune") / peak, "%", beside=IN_PUBLIC)
    if isinstance(trainer, str):
        report.note(f"transformers' Trainer: left out, {trainer}")
    else:
        ours = statistics.median(measured.seconds["finetune"])
        beside = f"Trainer's utilisation {100 * finetune / trainer / peak:.1f} %"
        report.add("finetune over transformers' Trainer", ours / trainer, goal=("at most", 1.0), beside=beside)
    report.add("teacher's offline forward: utilisation", 100 * measured.rate("forward") / peak, "%")
    report.add("cache job: utilisation", 100 * measured.rate("cache") / peak, "%")


def _add_memory(report: Report, measured: Measured, planned: Mapping[str, Any] | str) -> None:
    if isinstance(planned, str):
        report.note(f"plan: left out, {planned}")
        planned = {}
    for name, peak in measured.peak_bytes.items():
        said = planned.get(PLANNED.get(name, ""))
        beside = f"plan says {said / 2**30:.2f}" if said else ""
        report.add(f"{name}: peak memory", peak / 2**30, "GiB", beside=beside)
