"""The steps of one pair at its true size: ratios to plain work, utilisation, memory, data wait, and a profile of each.

The calls are those of bench.steps, timed in turn in this process on one rank. Random weights cost what trained ones do.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
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
from pipeline.runtime.display.logs import filter_logs

GOALS = {
    "interact_over_finetune": ("at most", 1.15),
    "verbalize_over_forwards": ("at most", 1.15),
    "cache_speed_over_forward": ("at least", 0.9),
}
MAX_DATA_WAIT = 2.0
"""Percent of stage 2's time."""
MEASURED_OVER_PLANNED = ("between", 0.85, 1.15)
IN_PUBLIC = "packed finetuning of Qwen2.5-VL-7B in public (lmms-engine): 30 to 40 %"
UTILISED = {"finetune": "finetune", "forward": "teacher's offline forward", "cache": "cache job"}
"""{timed call: its name in the table}."""
PLANNED = {"interact": "interact", "verbalize": "verbalize", "cache": "cache"}
"""{timed call: the step of `plan` that it is}. "finetune" here also holds the verbalizers."""


class Measured:
    """Seconds by round, operations in matrix products, and peak bytes of each call; a profile of each in the report."""

    def __init__(self, report: Report, device: Device):
        self.report, self.device = report, device
        self.seconds: dict[str, list[float]] = {}
        self.operations: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def rate(self, name: str) -> float:
        """Operations a second."""
        return self.operations[name] / statistics.median(self.seconds[name])

    def add(self, make: Callable[[], TimedCalls], rounds: int) -> None:
        """Build calls; count each one's operations and memory in its first run; time them in turn; profile each.

        Memory is what came on top of what was in use before they were built.
        """
        self.device.free_memory()
        before = self.device.used_bytes()
        calls = make()
        for name, call in calls.items():
            self.device.reset_peak()
            self.operations[name] = operations_of(call)
            self.device.wait()
            self.peak_bytes[name] = self.device.peak_bytes() - before
        self.seconds |= interleaved(calls, rounds, warm=True)
        for name, call in calls.items():
            self._profile(name, call)
        del calls, call
        self.device.free_memory()

    def _profile(self, name: str, call: Callable[[], object]) -> None:
        seconds = statistics.median(self.seconds[name])
        found = profiled(self.device, call, seconds)
        entry = {"seconds": seconds, "operations": self.operations[name], "by_round": self.seconds[name]}
        self.report.detail(name, {**entry, "profile": found})
        self.report.add(f"{name}: idle", 100 * found["idle_share"], "%", beside=f"{1e3 * seconds:.1f} ms a call")


def run(report: Report, device: Device, shapes: Shapes, place: Path, pair: str) -> None:
    """The ratios come first, what needs further processes last."""
    filter_logs()
    recipe = prepared_recipe(place, pair)
    peak = device.peak_rate() or product_rate(device, shapes.product)
    report.detail("peak_operations_a_second", peak)
    os.environ |= one_rank()
    prepared = PreparedRun(recipe, engine.start())
    report.detail("sizes", sizes(prepared))
    measured = Measured(report, device)
    measured.add(lambda: student_steps(prepared, live=False), shapes.step_rounds)
    _add_ratios(report, measured, "interact_over_finetune")
    measured.add(lambda: verbalize_steps(prepared), shapes.step_rounds)
    _add_ratios(report, measured, "verbalize_over_forwards")
    measured.add(lambda: cache_passes(prepared, place / pair / "written"), shapes.cache_rounds)
    _add_ratios(report, measured, "cache_speed_over_forward", "cache_speed_over_forward_and_heads")
    engine.stop()
    for name, what in UTILISED.items():
        beside = IN_PUBLIC if name == "finetune" else ""
        report.add(f"{what}: utilisation", 100 * measured.rate(name) / peak, "%", beside=beside)
    _add_memory(report, measured, planned_bytes(recipe, device.memory_bytes()))
    _add_trainer(report, measured, peak, trainer_seconds(recipe, shapes.updates, device, place / pair))
    workers = max(1, min(8, (os.cpu_count() or 2) - 2))
    waited = 100 * data_wait(recipe, workers, shapes.updates)
    report.add("data wait", waited, "%", ("under", MAX_DATA_WAIT), f"{workers} loader workers")


def _add_ratios(report: Report, measured: Measured, *names: str) -> None:
    for name in names:
        above, below = RATIOS[name]
        by_operations = measured.operations[above] / measured.operations[below]
        value = ratio(measured.seconds[above], measured.seconds[below])
        report.add(name.replace("_", " "), value, goal=GOALS.get(name), beside=f"by operations {by_operations:.2f}")


def _add_trainer(report: Report, measured: Measured, peak: float, trainer: float | str) -> None:
    """Trainer's utilisation is by the same operations as ours, whatever it computes beyond them."""
    if isinstance(trainer, str):
        report.note(f"transformers' Trainer: left out, {trainer}")
        return
    utilisation = f"Trainer's utilisation {100 * measured.operations['finetune'] / trainer / peak:.3g} %"
    over = statistics.median(measured.seconds["finetune"]) / trainer
    report.add("finetune over transformers' Trainer", over, goal=("at most", 1.0), beside=utilisation)


def _add_memory(report: Report, measured: Measured, planned: Mapping[str, Any] | str) -> None:
    if isinstance(planned, str):
        report.note(f"plan: left out, {planned}")
        planned = {}
    for name, peak in measured.peak_bytes.items():
        said = planned.get(PLANNED.get(name, ""))
        beside = f"plan says {said / 2**30:.2f}" if said else ""
        report.add(f"{name}: peak memory", peak / 2**30, "GiB", beside=beside)
        if said:
            report.add(f"{name}: measured over planned memory", peak / said, goal=MEASURED_OVER_PLANNED)
