"""Commands that depend on each other, a few at a time, each run once: what is done is not done again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.shards import write_file


@dataclass(frozen=True)
class Job:
    """A command of the product. `path` has its log and, once it is done, how long it took."""

    path: Path
    """Without a suffix: PATH.log and PATH.done are written."""
    command: Sequence[str]
    """Arguments of python."""
    needs: tuple[Path, ...] = ()
    """Paths of the jobs that come before it."""
    threads: int = 1

    @property
    def marker(self) -> Path:
        """The file that says that it is done."""
        return self.path.with_name(self.path.name + ".done")

    @property
    def log(self) -> Path:
        """Its output."""
        return self.path.with_name(self.path.name + ".log")

    def is_done(self) -> bool:
        """Whether it has run, with whatever code. Raises JobsFailed where another command has left its result there."""
        if not self.marker.exists():
            return False
        if json.loads(self.marker.read_text()).get("command") != list(self.command):
            raise JobsFailed(
                f"{self.path} was made by another command than the one that is asked for now: remove {self.path} and "
                f"{self.marker} to run this one: python {' '.join(self.command)}"
            )
        return True

    def seconds(self) -> float:
        """Processor seconds of the command, start-up included. Raises FileNotFoundError where it is not done.

        On one thread they are the wall seconds of a machine that does nothing else.
        """
        return float(json.loads(self.marker.read_text())["cpu_seconds"])


class JobsFailed(Exception):
    """Some jobs failed. Those that do not depend on them have run."""


def run_jobs(jobs: Iterable[Job], workers: int, title: str, device: str = "cpu") -> None:
    """Run all jobs that are not done, `workers` at a time. Raises JobsFailed with the end of the first log.

    device: cpu, or cuda: the first GPU, which they share.
    """
    by_path = {job.path: job for job in jobs if not job.is_done()}
    graph = TopologicalSorter({path: [p for p in job.needs if p in by_path] for path, job in by_path.items()})
    graph.prepare()
    failed: list[Job] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task(title, total=len(by_path))
        running: dict[Future[bool], Job] = {}
        while graph.is_active():
            for path in graph.get_ready():
                running[pool.submit(_run, by_path[path], device)] = by_path[path]
            if not running:
                break  # all that is left depends on a job that failed
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                progress.advance(task)
                if future.result():
                    graph.done(job.path)
                else:
                    failed.append(job)
    if failed:
        end = "\n".join(failed[0].log.read_text().splitlines()[-15:])
        raise JobsFailed(f"{len(failed)} jobs failed; the first: {failed[0].log}\n{end}")


def commit() -> str:
    """The commit of the code that runs, with -dirty where files differ that the ladder does not write itself."""
    done = subprocess.run(("git", "describe", "--always"), capture_output=True, text=True)
    others = ("git", "diff", "--quiet", "HEAD", "--", ".", ":!bench/results", ":!docs")
    return f"{done.stdout.strip()}{'-dirty' if subprocess.run(others).returncode else ''}" if done.stdout else "unknown"


def environment(threads: int = 1, device: str = "cpu") -> dict[str, str]:
    """One process, on a CPU or the first GPU. On one thread as many run side by side as there are cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else first,
        **{"DS_ACCELERATOR": device, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        **{"TOKENIZERS_PARALLELISM": "false", "TERM": "dumb"},
        # What DeepSpeed's launcher would set for one process.
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


def settings(values: Mapping[str, object]) -> list[str]:
    """--set KEY=VALUE arguments."""
    return ["--set", *(f"{key}={json.dumps(value)}" for key, value in values.items())]


def _run(job: Job, device: str) -> bool:
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as log:
        own = environment(job.threads, device)
        process = subprocess.Popen([sys.executable, *job.command], stdout=log, stderr=log, env=own)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    if process.returncode == 0:
        seconds = round(usage.ru_utime + usage.ru_stime, 2)
        done = {"cpu_seconds": seconds, "command": list(job.command), "commit": commit()}
        write_file(job.marker, json.dumps(done).encode())
    else:
        with job.log.open("a") as log:
            log.write(f"\nexit code {process.returncode}\n")
    return process.returncode == 0
