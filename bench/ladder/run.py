"""Run the ladder: for each cell the sweep, then its seeds; then the tables, the JSON and the figure. `make ladder`.

An arm that is done is not run again: a stopped ladder goes on with the same command, and a new arm is run alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.ladder import report
from bench.ladder.arms import BY_NAME, arms_of
from bench.ladder.cells import SCALES, SWEEP_SEEDS, Cell, Scale
from bench.ladder.jobs import Job, JobsFailed, run_jobs
from bench.ladder.plan import SeedFolder, Tried
from bench.ladder.sweep import choose, settings_to_try, swept_arm


def main() -> None:
    """`python -m bench.ladder`. Exit code 1 where a job failed; what does not need it runs all the same."""
    options = _parser().parse_args()
    scale = SCALES[options.scale]
    cells = [cell for cell in scale.cells if not options.cells or cell.name in options.cells]
    if unknown := sorted(set(options.cells or ()) - {cell.name for cell in cells}):
        names = ", ".join(cell.name for cell in scale.cells)
        sys.exit(f"error: --cells {unknown[0]}: expected some of {names} at the scale {options.scale}")
    folder = options.folder / options.scale
    if scale.device == "cuda" and not options.tables_only and not torch.cuda.is_available():
        sys.exit(f"error: --scale {options.scale} needs a CUDA device, and torch finds none; --scale cpu takes hours")
    workers = options.workers or _default_workers(scale.device)
    failed = []
    for cell in cells if not options.tables_only else ():
        seeds = min(options.seeds or cell.seeds, cell.seeds)
        try:
            run_jobs(_models(cell), workers, f"{cell.name}: models", scale.device)
            run_cell(folder, cell, scale, workers, options.arms, seeds)
        except JobsFailed as error:
            failed.append(f"{cell.name}: {error}")
        report.write(folder, scale, options.scale)
    if options.tables_only:
        report.write(folder, scale, options.scale)
    if failed:
        sys.exit("error: " + "\n".join(failed))


def run_cell(folder: Path, cell: Cell, scale: Scale, workers: int, names: list[str] | None, seeds: int) -> None:
    """The sweep of a cell, then its first seeds with the settings that were best there. names: some of its arms."""
    arms = [BY_NAME[name] for name in names] if names else arms_of(cell.arms, cell.also)
    tried = [
        setting
        for arm in {swept_arm(arm).name: swept_arm(arm) for arm in arms}.values()
        for setting in settings_to_try(scale, arm)
    ]
    if len(scale.learning_rates) > 1:
        run_jobs(
            _jobs(folder, cell, dict.fromkeys(SWEEP_SEEDS, tried), other_task=False),
            workers,
            f"{cell.name}: sweep",
            scale.device,
        )
    chosen = [choose(folder, cell, scale, arm) for arm in arms]
    quoted = {
        seed: [one for one in chosen if seed in one.arm.seeds(seeds, cell.variant_seeds)] for seed in range(seeds)
    }
    run_jobs(_jobs(folder, cell, quoted, other_task=True), workers, f"{cell.name}: seeds", scale.device)


def _default_workers(device: str) -> int:
    """On a GPU the jobs share its memory, of which each needs a few GiB: hosts have more cores than it has room."""
    cores = os.cpu_count() or 1
    return cores if device == "cpu" else min(cores, 8)


def _models(cell: Cell) -> list[Job]:
    """What makes its models, where they do not come from elsewhere."""
    return [Job(Path(cell.task.models, role), command) for role, command in cell.task.made_by.items()]


def _jobs(folder: Path, cell: Cell, by_seed: Mapping[int, list[Tried]], other_task: bool) -> list[Job]:
    return [
        job
        for seed, tried in by_seed.items()
        for job in SeedFolder(folder / cell.name, cell, seed, other_task).jobs(tried)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="how much of it (default: cpu)")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="these cells only")
    parser.add_argument("--arms", nargs="+", choices=BY_NAME, metavar="ARM", help="these arms only")
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of each cell only")
    parser.add_argument("--workers", type=int, help="arms side by side (default: the cores; on a GPU 8 at most)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/ladder"), help="where runs go (default: build/ladder)"
    )
    parser.add_argument("--tables-only", action="store_true", help="write tables, JSON and figure of what has run")
    return parser
