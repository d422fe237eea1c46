"""A run's SLURM jobs: their ids, as launch.submit left them in the run folder, and what SLURM says of them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import RecipeError

FOLDER = "jobs"
"""Folder of a run: job scripts, their output, and jobs.json."""
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "STAGE_OUT", "RESIZING")
"""States of SLURM that are not the end."""
ENDED_WELL = "COMPLETED"
NO_ANSWER = "NO_ANSWER"
"""Our word for the state where SLURM's commands fail, do not answer in time, or are not there."""
NO_SUCH_JOB = "Invalid job id specified"
"""With it squeue fails where it is asked for one job alone, which it has forgotten."""
ANSWER_S = 30
"""How long SLURM's commands may take to answer."""
SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Job:
    """One submitted job, or job array."""

    name: str
    """data, stage1, cache, stage2 or evaluate."""
    id: str
    """SLURM's number."""
    output: str
    """Its output file's pattern, as given to sbatch: %j, %A and %a stand for numbers, %% for %."""


@dataclass(frozen=True)
class JobState:
    """One job, or one task of an array, as SLURM knows it."""

    name: str
    id: str
    """NUMBER, or NUMBER_TASK."""
    state: str
    """SLURM's word in upper case; "" where SLURM no longer knows the job, NO_ANSWER where it does not say."""
    reason: str = ""
    """Why it waits, or why it failed."""
    restarts: int = 0
    """How often it has gone back to the queue."""
    time: str = ""
    """How long it has run since its last start, as SLURM writes it."""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state.startswith(ACTIVE)

    @property
    def known(self) -> bool:
        """Whether SLURM has told the state."""
        return self.state not in ("", NO_ANSWER)

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return self.known and not self.active and self.state != ENDED_WELL


def write_jobs(run: Path, jobs: Sequence[Job]) -> None:
    """Keep the newest chain's jobs in the run folder."""
    path = run / FOLDER / "jobs.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps([asdict(job) for job in jobs], indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def read_jobs(run: Path) -> list[Job]:
    """The newest chain's jobs, in order; none where launch.submit has not run. Raises RecipeError for another file."""
    path = run / FOLDER / "jobs.json"
    try:
        return [Job(**job) for job in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise RecipeError(f"{path} is not what launch.submit writes ({error}); remove it") from None


def job_states(jobs: Sequence[Job]) -> list[JobState]:
    """What SLURM says of each job and array task: squeue of those it holds in memory, sacct of those before."""
    if not jobs:
        return []
    answered = _squeue([job.id for job in jobs])
    found = answered or []
    known = {state.id.partition("_")[0] for state in found}
    if forgotten := [job.id for job in jobs if job.id not in known]:
        found += _sacct(forgotten)
    unknown = NO_ANSWER if answered is None else ""
    names = {job.id: job.name for job in jobs}
    states = []
    for job in jobs:
        own = [state for state in found if state.id.partition("_")[0] == job.id]
        states += own or [JobState(job.name, job.id, unknown)]
    return [_named(state, names[state.id.partition("_")[0]]) for state in states]


def output_of(job: Job, state: JobState) -> Path:
    """The output file of a job or of an array's task; of an array as a whole with * for each task."""
    number, _, task = state.id.partition("_")
    stands_for = {"%j": number, "%A": number, "%a": task or "*", "%%": "%"}
    return Path(re.sub("%.", lambda sign: stands_for.get(sign[0], sign[0]), job.output))


def last_error(path: Path) -> str:
    """The last line of a job's output that reports an error; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if _reports(line)), "")


def _reports(line: str) -> bool:
    return line.startswith(("error: ", "WRONG ")) or (
        line.startswith("rank ") and (" failed: " in line or " error: " in line)
    )


def _named(state: JobState, name: str) -> JobState:
    return JobState(name, state.id, state.state, state.reason, state.restarts, state.time)


def _squeue(ids: Sequence[str]) -> list[JobState] | None:
    """None where it does not answer."""
    fields = ("JobArrayID", "State", "Reason", "RestartCnt", "TimeUsed", "exit_code")
    layout = ",".join(f"{field}:{SEPARATOR}" for field in fields)
    text = _ask(["squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join(ids)}", f"--Format={layout}"])
    if text is None:
        return None
    states = []
    for line in text.splitlines():
        number, state, reason, restarts, time, code = line.split(SEPARATOR)[: len(fields)]
        states.append(JobState("", number, state, _reason(state, reason, code), int(restarts or 0), time))
    return states


def _sacct(ids: Sequence[str]) -> list[JobState]:
    """Without accounting sacct fails, and nothing is known. It fails as well where it is asked for a field that it does
    not have: that of SLURM 22.05 has no Restarts.
    """
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}"]
    fields = "--format=JobID,State,Elapsed,ExitCode"
    if (text := _ask([*command, f"{fields},Restarts"])) is None:
        text = _ask([*command, fields])
    states = []
    for line in (text or "").splitlines():
        number, state, time, code, restarts = [*line.split("|"), ""][:5]
        word = state.split()[0] if state else ""  # "CANCELLED by 1000"
        states.append(JobState("", number, word, _reason(word, "", code.split(":")[0]), int(restarts or 0), time))
    return states


def _reason(state: str, reason: str, code: str) -> str:
    """Why a job waits or has failed. `None` is SLURM's word for no reason."""
    said = "" if reason == "None" else reason
    if state.startswith(ACTIVE) or state == ENDED_WELL or code in ("", "0"):
        return said if state != ENDED_WELL else ""
    return ", ".join(filter(None, [said if said != "NonZeroExitCode" else "", f"exit code {_exit_status(code)}"]))


def _exit_status(code: str) -> int:
    """SLURM's squeue shows the status as wait() gives it: 256 x the exit code."""
    number = int(code)
    return number >> 8 if number >= 256 else number


def _ask(command: Iterable[str]) -> str | None:
    """What a command of SLURM's prints; None where it fails or does not answer."""
    try:
        return subprocess.run(list(command), capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout
    except subprocess.CalledProcessError as error:
        return "" if NO_SUCH_JOB in error.stderr else None
    except (OSError, subprocess.SubprocessError):
        return None
