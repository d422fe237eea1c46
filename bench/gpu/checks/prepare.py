"""Random models of each pair, their data, and stage 1: what the checks of steps then measure with."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.shapes import Shapes
from bench.steps import pairs
from bench.steps.startup import train


def run(report: Report, device: Device, shapes: Shapes, place: Path) -> None:
    """Leaves place/PAIR/recipe.yaml and its run for each pair."""
    for pair in shapes.pairs:
        folder = place / pair
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun = time.perf_counter()
        report.detail(pair, pairs.prepare(pair, folder, device.kind))
        device.free_memory()
        report.add(f"{pair}: models and data written", time.perf_counter() - begun, "s")
        begun = time.perf_counter()
        train("--stage", "1", "--recipe", str(folder / "recipe.yaml"))
        report.add(f"{pair}: stage 1, from the command to the whole cache", time.perf_counter() - begun, "s")


def prepared_recipe(place: Path, pair: str) -> Path:
    """The recipe of a prepared pair. Raises RuntimeError where its stage 1 is not there."""
    recipe = place / pair / "recipe.yaml"
    if not any((place / pair / "run" / "cache").glob("*/manifest.json")):
        raise RuntimeError(f"{recipe.parent} has no complete stage 1: the check `prepare`, which makes it, did not end")
    return recipe
