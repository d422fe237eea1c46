"""Run checks as processes: side by side, each under its time limit, none of their processes left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.gpu.figures import Figure
from data_prep.atomic import write_file

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000
"""Characters of a check's output that are kept."""
GRACE_S = 5.0
"""Time between the request to end and the end."""


@dataclass(frozen=True)
class Job:
    """A check to be started."""

    name: str
    command: Sequence[str]
    limit_s: float
    output: Path
    """The JSON that the check writes."""


@dataclass(frozen=True)
class Ended:
    """How a check ended, and what it had found by then."""

    name: str
    status: str
    """"ok", or in words what happened instead."""
    failed: bool = False
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def left_out(name: str, why: str) -> Ended:
    """A check that was not started: no failure, but no figure either."""
    return Ended(name, f"left out: {why}")


class _Running:
    """A job's process, in a process group of its own."""

    def __init__(self, job: Job, environment: Mapping[str, str]):
        self.job, self.begun, self.said = job, time.monotonic(), tempfile.TemporaryFile("w+b")  # noqa: SIM115  # lives as long as the job
        self.process = subprocess.Popen(
            job.command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
            stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        print(f"{job.name}: started, at most {job.limit_s:.0f} s", flush=True)

    def over(self) -> bool:
        """Whether its process has ended."""
        return self.process.poll() is not None

    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.begun > self.job.limit_s

    def end_group(self) -> None:
        """End its process and all that it started, which may hold the device: first asked, then forced."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._signal(number):
                break
            end = time.monotonic() + GRACE_S
            while self._signal(0) and time.monotonic() < end:
                self.process.poll()
                time.sleep(0.05)
        self.process.wait()

    def _signal(self, number: int) -> bool:
        """Signal the process group (0: only look); whether there still is one."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def ended(self) -> Ended:
        """Its result; the end of its output goes into its JSON, and where it failed onto the screen."""
        late, code = not self.over(), self.process.poll()
        seconds = time.monotonic() - self.begun
        self.end_group()
        output = _tail(self.said)
        status = f"timed out after {self.job.limit_s:.0f} s" if late else f"failed: exit code {code}" if code else "ok"
        entry = _read(self.job.output) | {"status": status, "seconds": round(seconds, 1), "output": output}
        write_file(self.job.output, (json.dumps(entry, indent=2) + "\n").encode())
        print(
            f"{self.job.name}: {status}, {seconds:.0f} s", *([output] if status != "ok" else []), sep="\n", flush=True
        )
        figures = tuple(map(Figure.from_json, entry.get("figures", [])))
        notes = (*entry.get("notes", []), *([f"last line: {_last(output)}"] if status != "ok" else []))
        return Ended(self.job.name, status, status != "ok", seconds, figures, notes, entry.get("details", {}))


def run_together(jobs: Sequence[Job], environment: Mapping[str, str]) -> Iterator[Ended]:
    """Start all jobs; give each one's result when it has ended or run out of time. Closing the iterator ends them."""
    waiting = [_Running(job, environment) for job in jobs]
    try:
        while waiting:
            for one in [one for one in waiting if one.over() or one.late()]:
                result = one.ended()
                waiting.remove(one)
                yield result
            time.sleep(0.05)
    finally:
        for one in waiting:
            one.end_group()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _tail(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - TAIL))
    return said.read().decode("utf-8", "replace")


def _last(output: str) -> str:
    return (output.strip().splitlines() or ["it said nothing"])[-1][:200]
