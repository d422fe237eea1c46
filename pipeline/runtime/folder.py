"""The state of a run's steps on disk: begun, done, metrics. Imports no torch: recipes are checked against it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from data_prep.schema import parse_json
from data_prep.shards import write_file
from pipeline.errors import DataError
from pipeline.recipe.schema import STEPS

HELD_OUT = ("held_out_loss", "held_out_exact_match")
"""What lines of metrics.jsonl have of held-out data: nat a response token, and a share from 0 to 1 of the answers that
are whole, where one is."""
KERNELS = "kernels.json"
"""File of a run folder: the kernels of its newest invocation."""
LOCK_S = 10.0
"""How long at most lines wait for those of another job."""
REQUEUE = "requeue.json"
"""File of a run folder that stands there while its newest invocation is one that was asked to stop. Of cache jobs side
by side it says nothing: they are several."""


def ids_of(verbalize: Mapping[str, Any], role: str) -> int:
    """The number of ids of a model's distributions, from step verbalize's summary.

    Of a shared vocabulary both models have the same number, of a mapped one each has its own.
    """
    ids = verbalize["vocab"]
    return ids[role] if isinstance(ids, dict) else ids


def mark_done(folder: Path, summary: dict[str, Any]) -> None:
    """Write done.json, aside and renamed: a step is complete once it exists."""
    write_json(folder / "done.json", summary)


def done(folder: Path) -> dict[str, Any] | None:
    """The summary of a complete step, or None. Raises DataError where the file is damaged."""
    path = folder / "done.json"
    try:
        summary = parse_json(path.read_bytes())
        if not isinstance(summary, dict):
            raise ValueError(f"expected an object, found {type(summary).__name__}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {error}. Remove it, and run the step again: it goes on from its last checkpoint"
        ) from None
    return summary


def begun_steps(run: Path) -> list[str]:
    """The steps that have left something in the run folder."""
    return [step for step in STEPS if (run / step).is_dir() and any((run / step).iterdir())]


def trained_verb_ffns(run: Path) -> Path:
    """The student's verb-FFNs as interact left them: a file where interact.train_verbalizers is true."""
    return run / "interact" / "student_verbalizers.safetensors"


def read_metrics(run: Path, step: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, of one step or all. What is no such line, as after a crash, is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        is_line = isinstance(line, dict) and isinstance(line.get("step"), str) and isinstance(line.get("update"), int)
        if is_line and (step is None or line["step"] == step):
            lines.append(line)
    return lines


def append_lines(path: Path, text: str) -> None:
    """Append lines to a file that jobs on other hosts append to: over NFS, two that write at once overwrite each other.

    A client of NFS that takes the lock sees what others have written before. Where there is no lock to be had, on a
    file system without them or from a host that died with it, a line may be lost: no job ends or waits for that.
    """
    with path.open("a", encoding="utf-8") as file:
        _lock(file)
        file.write(text)  # closing it writes, then unlocks


def _lock(file: TextIO) -> None:
    until = time.monotonic() + LOCK_S
    while time.monotonic() < until:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return None
    return None


def write_kernels(run: Path, text: str) -> None:
    """Keep which kernels the run's newest invocation uses, and why."""
    write_json(run / KERNELS, {"kernels": text})


def read_kernels(run: Path) -> str | None:
    """What `write_kernels` kept; None where nothing has run yet."""
    path = run / KERNELS
    return json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else None


def write_requeue(run: Path, why: str) -> None:
    """Say in the run folder that its newest invocation stopped when it was asked to, and is to be started again.

    For job scripts whose launcher has its own exit code (docs/when_it_fails.md).
    """
    write_json(run / REQUEUE, {"why": why})


def clear_requeue(run: Path) -> None:
    """Take back what write_requeue said: an invocation goes on."""
    (run / REQUEUE).unlink(missing_ok=True)


def read_requeue(run: Path) -> str | None:
    """What `write_requeue` said; None where the newest invocation was not asked to stop, or has not stopped yet."""
    path = run / REQUEUE
    return json.loads(path.read_text(encoding="utf-8"))["why"] if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, also where other jobs write the same file."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())
