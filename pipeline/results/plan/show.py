"""A plan as tables for people, and as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.results.plan.knobs import applied, fits, remedy
from pipeline.results.plan.machine import GIB, Machine
from pipeline.results.plan.run import Planned, StepPlan
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.speed import faster
from pipeline.runtime.display.progress import size_text

SIZES = (8, 64, 512)
"""Numbers of GPUs that are compared."""

WIDTH = 120
"""Columns where the output is no terminal: rich would take 80 and break lines."""

CAUSES = {
    "weights": "weights, as they lie",
    "gathered": "weights, gathered",
    "gradients": "gradients, summed",
    "optimizer": "masters and moments",
    "buckets": "gradient buckets",
    "kept": "activations kept",
    "working": "largest layer or head",
    "batch": "batch",
    "update": "(in the update instead)",
}
"""Field of StepMemory -> what the table says."""


def show(planned: Planned, machine: Machine) -> None:
    """Print the plan for a machine, and the comparison of several sizes."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    plans = [planned.plan(step, machine) for step in planned.steps]
    for line in _heading(planned, machine):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_memory_table(plans, machine))
    console.print(_time_table(plans))
    for line in _advice(planned, plans, machine):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_sizes_table(planned, machine))


def to_json(planned: Planned, machine: Machine) -> str:
    """Everything that the tables show, in bytes, seconds and operations."""
    plans = [planned.plan(step, machine) for step in planned.steps]
    sizes = {str(n): [_step_json(planned.plan(s, replace(machine, gpus=n))) for s in planned.steps] for n in SIZES}
    whole = {
        "machine": asdict(machine) | {"usable_bytes": machine.usable},
        "samples": asdict(planned.samples),
        "own_samples": {step: asdict(samples) for step, samples in planned.own.items()},
        "parameters": _parameters(planned),
        "cache": asdict(planned.cache()) | {"bytes": planned.cache().bytes},
        "steps": [_step_json(plan) | _remedies(planned, plan, machine) for plan in plans],
        "gpus": sizes,
    }
    return json.dumps(whole, indent=2)


def _step_json(plan: StepPlan) -> dict[str, Any]:
    time = asdict(plan.time) | {"seconds": plan.time.seconds, "bound": plan.time.bound}
    time["slurm_hours"] = plan.time.slurm_hours
    memory = asdict(plan.memory) | {"total": plan.memory.total}
    host = asdict(plan.host) | {"total": plan.host.total}
    disk = asdict(plan.disk) | {"total": plan.disk.total}
    return {"step": plan.name, "problem": plan.problem, "memory": memory, "host": host, "disk": disk, "time": time}


def _remedies(planned: Planned, plan: StepPlan, machine: Machine) -> dict[str, Any]:
    if fits(plan, machine):
        return {"fits": True}
    changes = remedy(planned, plan.name, machine)
    return {"fits": False, "remedy": None if changes is None else {c.key: str(c.value) for c in changes}}


def _parameters(planned: Planned) -> dict[str, int]:
    form = planned.recipe.verbalizer.form
    found = {}
    for side in (planned.teacher, planned.student):
        found[side.role] = side.elements()
        found[f"{side.role}_verbalizers"] = sum(p.elements for p in side.verb_ffns(form, trained=True))
    return found


def _heading(planned: Planned, machine: Machine) -> list[str]:
    counts, samples, cache = _parameters(planned), planned.samples, planned.cache()
    lines = [
        f"{side.role + ':':<9}{_short(counts[side.role])} parameters, {side.depth} layers of {side.width}; "
        f"{_short(counts[side.role + '_verbalizers'])} in verbalizers on {len(side.layers)} layers"
        for side in (planned.teacher, planned.student)
    ]
    lines.append(f"data:    {_lengths(samples)}")
    for step, folder in planned.recipe.own_folders().items():
        its = planned.own.get(step)
        found = f"counted as if it were data.train: {folder} cannot be measured here" if its is None else _lengths(its)
        lines += [f"         {step}.train: {found}"] if step in planned.steps else []
    each = cache.distributions / max(1.0, cache.token_layers)
    if "interact" in planned.steps:
        lines.append(
            f"cache:   {size_text(cache.bytes)} on disk: {_short(cache.token_layers)} token-layers of {each:.1f} bytes "
            f"({cache.stated})"
        )
    speed = f"{machine.tflops:g} TFLOP/s at {machine.utilisation:.0%}"
    lines.append(
        f"machine: {machine.gpus} GPUs on {machine.nodes} nodes, {machine.gpu_memory:g} GiB each, {speed}, "
        f"{machine.network:g} GB/s a GPU between nodes"
    )
    return lines


def _lengths(samples: Samples) -> str:
    origin = ", ".join(sorted(set(samples.origins.values())))
    return (
        f"{samples.count:,} samples of {samples.tokens:,.0f} tokens, {samples.image:,.0f} of an image and "
        f"{samples.response:,.0f} of a response; the longest {samples.longest:,} ({origin})"
    )


def _memory_table(plans: Sequence[StepPlan], machine: Machine) -> Table:
    table = _table("memory and disk in GiB", ["a GPU", *(plan.name for plan in plans)])
    for field, text in CAUSES.items():
        table.add_row(text, *(_gib(getattr(plan.memory, field)) for plan in plans))
    table.add_section()
    table.add_row("most at a time", *(_gib(plan.memory.total) for plan in plans))
    usable = machine.usable / GIB
    table.add_row(f"fits in {usable:.1f} GiB", *("yes" if fits(plan, machine) else "NO" for plan in plans))
    table.add_section()
    table.add_row("a node's CPU side", *(_gib(plan.host.total) for plan in plans))
    table.add_row("disk: checkpoints", *(_gib(plan.disk.checkpoints) for plan in plans))
    table.add_row("disk: what it leaves", *(_gib(plan.disk.result) for plan in plans))
    return table


def _time_table(plans: Sequence[StepPlan]) -> Table:
    table = _table("time", ["", *(plan.name for plan in plans)])
    rows: Mapping[str, Callable[[StepPlan], str]] = {
        "epochs": lambda p: f"{p.time.epochs:.2f}",
        "updates (cache: batches)": lambda p: f"{p.time.updates:,}",
        "micro-steps an update": lambda p: f"{p.time.micro_steps:.1f}".removesuffix(".0"),
        "real of computed tokens": lambda p: f"{p.time.real_share:.0%}",
        "received a GPU and update": lambda p: size_text(p.time.received),
        "operations": lambda p: f"{p.time.operations:.2e}",
        "hours computing": lambda p: _hours(p.time.computing),
        "hours moving bytes": lambda p: _hours(p.time.moving),
        "hours": lambda p: _hours(p.time.seconds),
        "bound by": lambda p: p.time.bound,
        "sbatch --time": lambda p: f"{p.time.slurm_hours}:00:00",
    }
    for text, value in rows.items():
        table.add_row(text, *(value(plan) for plan in plans))
    return table


def _advice(planned: Planned, plans: Sequence[StepPlan], machine: Machine) -> list[str]:
    lines = []
    for plan in plans:
        if not fits(plan, machine):
            lines.append(_remedy_line(planned, plan, machine))
        elif changes := faster(planned, plan.name, machine):
            better = planned.with_recipe(applied(planned.recipe, changes)).plan(plan.name, machine).time
            hours = f"{_hours(better.seconds)} hours instead of {_hours(plan.time.seconds)}"
            why = (
                "waits for the network"
                if plan.time.bound == "network"
                else f"{plan.time.real_share:.0%} of its tokens are real"
            )
            lines.append(f"{plan.name}: {why}; it fits with {' and '.join(map(str, changes))}, which takes {hours}")
    return lines


def _remedy_line(planned: Planned, plan: StepPlan, machine: Machine) -> str:
    found = plan.problem or f"needs {_gib(plan.memory.total)} GiB a GPU of {machine.usable / GIB:.1f}"
    changes = remedy(planned, plan.name, machine)
    if changes is None:
        return f"{plan.name}: {found}; no field of the recipe helps on {machine.gpus} GPUs: use more, or a smaller pair"
    return f"{plan.name}: {found}; it fits with {' and '.join(map(str, changes))}"


def _sizes_table(planned: Planned, machine: Machine) -> Table:
    table = _table("GiB a GPU, hours, and what binds", ["GPUs", *planned.steps, "GPU hours"])
    for number in SIZES:
        sized = replace(machine, gpus=number)
        plans = [planned.plan(step, sized) for step in planned.steps]
        cells = [f"{_gib(p.memory.total)}, {_hours(p.time.seconds)} h, {_bound(p, sized)}" for p in plans]
        table.add_row(str(number), *cells, f"{sum(p.time.seconds for p in plans) / 3600 * number:,.0f}")
    return table


def _bound(plan: StepPlan, machine: Machine) -> str:
    if plan.problem:
        return "batch" if plan.name != "cache" else "shards"
    return plan.time.bound if fits(plan, machine) else "memory"


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}"


def _short(number: float) -> str:
    """4026695680 -> "4.0B"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
