"""Compare whole steps with plain ones; measure the data wait and the start-up time. `make bench-steps`.

  python -m bench.steps                      the demo's pair and a small one with a vocabulary of 151,936, on a CPU
  python -m bench.steps --shape real         pairs of real shapes, 0.5B and 2B students; needs a GPU with 80 GB
  python -m bench.steps --shape real-cpu     one sample of a 0.5B student and a 2B teacher on a CPU: 15 minutes, 20 GB

Writes bench/results/steps.json (steps_real.json, steps_real_cpu.json). The steps run in turn in one process on one
rank; ratios are medians over the rounds. Beside each ratio of times is the ratio of operations in matrix products: what
the ratio would be if nothing else took time. On a CPU one thread computes, two for real shapes; otherwise the other
core runs the writer and the loader.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

PAIRS = {"demo": ["demo"], "small": ["small"], "real": ["real-0.5b", "real-2b"], "real-cpu": ["real-0.5b-cpu"]}
RESULTS = {"real": "steps_real", "real-cpu": "steps_real_cpu"}
"""Name of the results file; "steps" for other shapes."""
ROUNDS = {"demo": 9, "small": 3, "real-0.5b": 9, "real-2b": 9, "real-0.5b-cpu": 3}
UPDATES = {"demo": 40, "small": 3, "real-0.5b": 40, "real-2b": 40, "real-0.5b-cpu": 0}
"""Number of updates of stage 2 used to measure how long it waits for data."""
GOALS = {
    "interact_over_finetune": ("at most", 1.25),
    "verbalize_over_forwards": ("at most", 1.25),
    "cache_speed_over_forward": ("at least", 0.85),
}
"""For real shapes, where the vocabulary is a small part of the work."""
MAX_DATA_WAIT = 0.02


def show(entries: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the tables."""
    table = Table(title="Whole steps: time (by operations alone)")
    for column in ("ratio", "goal at real shapes", *entries):
        table.add_column(column, justify="left" if column == "ratio" else "right")
    ratios = [name for name, value in next(iter(entries.values())).items() if _is_ratio(value)]
    for name in ratios:
        cells = [f"{entry[name]['time']:.2f} ({entry[name]['operations']:.2f})" for entry in entries.values()]
        table.add_row(name, "{} {}".format(*GOALS[name]) if name in GOALS else "", *cells)
    peaks = [entry["peak_mib"] for entry in entries.values()]
    table.add_row("peak memory, live teacher", "", *(f"{peak['live_teacher']:,} MiB" for peak in peaks))
    table.add_row("peak memory, cache", "", *(f"{peak['cache']:,} MiB" for peak in peaks))
    for workers in ("1_workers", "2_workers"):
        shares = [entry.get("data_wait_share", {}).get(workers) for entry in entries.values()]
        waits = ["" if share is None else f"{share:.1%}" for share in shares]
        table.add_row(f"data wait, loader workers: {workers[0]}", f"below {MAX_DATA_WAIT:.0%}", *waits)
    console.print(table)
    for entry in entries.values():
        if "start_up" in entry:
            _show_start(entry["start_up"], console)


def _is_ratio(value: Any) -> bool:
    return isinstance(value, Mapping) and "operations" in value


def _show_start(start: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"From `deepspeed launch/train.py --stage 2` to the first update: {start['wall_s']} s")
    for column in ("until", "wall s", "CPU s of the rank"):
        table.add_column(column, justify="left" if column == "until" else "right")
    for phase, spent in start["phases"].items():
        table.add_row(phase, f"{spent['wall_s']:.2f}", f"{spent['cpu_s']:.2f}")
    console.print(table)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=PAIRS, default=["demo", "small"], help="default: demo small")
    shapes = parser.parse_args().shape
    import torch

    on_cpu = not torch.cuda.is_available()
    if "real" in shapes and on_cpu:
        parser.error("--shape real needs a GPU with 80 GB, and torch finds none; a CPU can measure demo and small")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if on_cpu:
        threads = 2 if shapes == ["real-cpu"] else 1
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
        torch.set_num_threads(threads)
    from pipeline.runtime.display.logs import filter_logs

    filter_logs()
    from bench.steps.measures import measure
    from bench.steps.startup import one_rank
    from bench.timing import machine, write_results
    from pipeline.runtime import engine

    os.environ |= one_rank()
    ranks, console, entries = engine.start(), Console(), {}
    for pair in [pair for shape in shapes for pair in PAIRS[shape]]:
        console.print(f"{pair}: {ROUNDS[pair]} rounds")
        entries[pair] = measure(pair, ROUNDS[pair], UPDATES[pair], ranks)
    show(entries, console)
    goals = {name: {limit: value} for name, (limit, value) in GOALS.items()}
    results = {**machine(), "goals_at_real_shapes": goals, **entries}
    path = write_results(next((RESULTS[shape] for shape in shapes if shape in RESULTS), "steps"), results)
    console.print(f"written: {path}")
