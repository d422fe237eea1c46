"""The losses beside the same device's matrix products, and beside Liger, TRL and cut-cross-entropy where installed.

7 student layers follow one of 14 candidates each. The floor, the forms and the memory are those of bench.losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.shapes import Shapes
from bench.losses.problem import Case, Problem
from bench.losses.run import FUSED, GPU_DENSE_TOKENS, compare_floor, compare_one_layer, interaction_over_peers

MAX_OVER_PRODUCTS = 1.3
MAX_MEMORY_MB = 1000.0
THREADS = 2
"""torch's, where a process of its own measures memory on a CPU."""


def run(report: Report, device: Device, shapes: Shapes, place: Path) -> None:
    """The interaction loss at each width first: that is the goal. Other packages' divergences come last."""
    for name, case in shapes.losses.items():
        entry = compare_floor(case, shapes.loss_rounds, THREADS)
        report.detail(f"interaction_{name}", entry)
        _add(report, f"interaction, {name}", entry)
    for name, case in shapes.losses.items():
        for loss, entry in compare_one_layer(case, THREADS).items():
            report.detail(f"{loss}_{name}", entry)
            _add(report, f"{loss.replace('_', ' ')}, {name}", entry)
            for peer, why in entry["peers_not_run"].items():
                report.note(f"{peer} beside {loss.replace('_', ' ')}, {name}: left out, {why}")
    for name, case in shapes.losses.items():
        _peers(report, name, case)


def _add(report: Report, name: str, entry: Mapping[str, Any]) -> None:
    limit = ("at most", MAX_OVER_PRODUCTS)
    report.add(f"{name}: over its products", entry["time_over_floor"], goal=limit, beside=_others(entry))
    frozen = "trained" not in name  # a trained head's gradient is as large as the head
    megabytes = entry["peak_mib"]["ours"] * 2**20 / 1e6
    report.add(f"{name}: memory", megabytes, "MB", ("under", MAX_MEMORY_MB) if frozen else None)


def _others(entry: Mapping[str, Any]) -> str:
    """Other forms' times over the same products."""
    floor = entry["seconds"]["floor"]
    others = {form: entry["seconds"][form] / floor for form in ("naive", *FUSED) if form in entry["seconds"]}
    return ", ".join(f"{form} {value:.2f}" for form, value in others.items())


def _peers(report: Report, name: str, case: Case) -> None:
    """Other packages' divergence of one layer, over ours. Fewer tokens, as bench-losses takes them there."""
    tokens = min(case.tokens, GPU_DENSE_TOKENS)
    one_layer = replace(case, tokens=tokens, students=1, teachers=case.teachers - case.students + 1)
    for peer, entry in interaction_over_peers(Problem(one_layer)).items():
        if "not_run" in entry:
            report.note(f"{peer}, {name}: left out, {entry['not_run']}")
        else:
            report.add(f"{peer} over ours, one student layer, {name}", entry["over_ours_time"], beside=entry["note"])
