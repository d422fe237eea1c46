"""The state of a run's steps on disk: begun, done, metrics. Imports no torch: recipes are checked against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.shards import write_file
from pipeline.recipe.schema import STEPS

KERNELS = "kernels.json"
"""File of a run folder: the kernels of its newest invocation."""


def mark_done(folder: Path, summary: dict[str, Any]) -> None:
    """Write done.json, aside and renamed: a step is complete once it exists."""
    write_json(folder / "done.json", summary)


def done(folder: Path) -> dict[str, Any] | None:
    """The summary of a complete step, or None."""
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def begun_steps(run: Path) -> list[str]:
    """The steps that have left something in the run folder."""
    return [step for step in STEPS if (run / step).is_dir() and any((run / step).iterdir())]


def trained_verb_ffns(run: Path) -> Path:
    """The student's verb-FFNs as interact left them: a file where interact.train_verbalizers is true."""
    return run / "interact" / "student_verbalizers.safetensors"


def read_metrics(run: Path, step: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, of one step or all; a last line cut short by a crash is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if step is None or line["step"] == step:
            lines.append(line)
    return lines


def write_kernels(run: Path, text: str) -> None:
    """Keep which kernels the run's newest invocation uses, and why."""
    write_json(run / KERNELS, {"kernels": text})


def read_kernels(run: Path) -> str | None:
    """What `write_kernels` kept; None where nothing has run yet."""
    path = run / KERNELS
    return json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, also where other jobs write the same file."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())
