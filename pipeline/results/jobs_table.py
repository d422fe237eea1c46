"""A run's SLURM jobs as a table for `status`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pipeline.results.jobs import NO_ANSWER, Job, JobState, job_states, last_error, output_of

WORDS = {"PENDING": "queued", "RUNNING": "running", "COMPLETED": "done"}
WORDS |= {"": "SLURM no longer knows it", NO_ANSWER: "SLURM does not answer"}
"""SLURM's state -> ours; other states keep their name, in lower case."""


def render(jobs: Sequence[Job]) -> Table:
    """One row for each job; tasks of an array that are in the same state for the same reason share one."""
    table = Table(title="SLURM jobs", title_justify="left")
    for heading in ("job", "id", "state", "time", "why"):
        table.add_column(heading, overflow="fold")
    states = job_states(jobs)
    for job in jobs:
        rows: dict[tuple[str, str], list[JobState]] = {}
        for state in states:
            if state.id.partition("_")[0] == job.id:
                rows.setdefault((word(state), _why(job, state)), []).append(state)
        for (said, why), members in rows.items():
            table.add_row(job.name, _numbers(members), said, members[-1].time, why)
    return table


def word(state: JobState) -> str:
    """The state for people: a job that waits after a restart is requeued, not just queued."""
    said = WORDS.get(state.state, state.state.lower().replace("_", " "))
    if state.state == "PENDING" and state.restarts:
        return f"requeued ({state.restarts} times)" if state.restarts > 1 else "requeued"
    if state.failed:
        return f"failed ({said})" if state.state != "FAILED" else "failed"
    return f"{said} (start {state.restarts + 1})" if state.state == "RUNNING" and state.restarts else said


def _why(job: Job, state: JobState) -> str:
    output = output_of(job, state)
    if state.failed:
        return ": ".join(filter(None, [state.reason, last_error(output) or f"see {output}"]))
    if not state.known:
        errors = filter(None, map(last_error, sorted(output.parent.glob(output.name))))
        return next((f"the last error of its output: {error}" for error in errors), "")
    return "the job before it" if state.reason == "Dependency" else state.reason


def _numbers(states: Sequence[JobState]) -> str:
    """ "12"; "12_0"; of several tasks "12_0 to 12_7 (8)"."""
    first, last = states[0].id, states[-1].id
    return first if first == last else f"{first} to {last} ({len(states)})"
