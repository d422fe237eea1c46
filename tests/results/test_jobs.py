"""What SLURM says of a run's jobs, and how status shows it. squeue and sacct are stand-ins here."""

import io
import json
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_run import write_recipe

from pipeline.__main__ import main
from pipeline.errors import RecipeError
from pipeline.results import jobs_table
from pipeline.results.jobs import NO_ANSWER, Job, JobState, job_states, last_error, output_of, read_jobs, write_jobs
from pipeline.results.status import duration_text, status

SAY = '#!/usr/bin/env bash\ncat "$(dirname "$0")/$(basename "$0").txt" 2>/dev/null || exit 1\n'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "sacct"):
        (folder / name).write_text(SAY)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def queue(folder, *jobs):
    """jobs: (id, state, reason, restarts, time, status as wait() gives it)."""
    (folder / "squeue.txt").write_text("".join("\x1f".join((*job, "\n")) for job in jobs))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    names = {"stage1": "7", "cache": "8", "stage2": "9"}
    pattern = {"cache": "cache-%A_%a.out"}
    write_jobs(
        tmp_path / "run",
        [
            Job(name, id, str(tmp_path / "run" / "jobs" / pattern.get(name, f"{name}-%j.out")))
            for name, id in names.items()
        ],
    )
    return tmp_path / "run"


def shown(run) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(jobs_table.render(read_jobs(run)))
    return console.export_text()


def test_states_in_words(slurm, run):
    queue(
        slurm,
        ("7", "RUNNING", "None", "2", "1:00:05", "0"),
        ("8_0", "PENDING", "BeginTime", "1", "0:00", "0"),
        ("8_1", "COMPLETED", "None", "0", "5:00", "0"),
        ("8_2", "COMPLETED", "None", "0", "6:00", "0"),
        ("9", "PENDING", "Dependency", "0", "0:00", "0"),
    )
    text = shown(run)
    for words in (
        ("stage1", "7", "running (start 3)", "1:00:05"),
        ("cache", "8_0", "requeued", "BeginTime"),
        ("cache", "8_1 to 8_2 (2)", "done", "6:00"),
        ("stage2", "9", "queued", "the job before it"),
    ):
        assert any(all(word in line for word in words) for line in text.splitlines()), (words, text)


def test_a_failure_shows_its_cause(slurm, run):
    (run / "jobs" / "stage1-7.out").write_text(
        "loading\nerror: no room: 3 GB needed\nsrun: error: node1: exit code 2\n"
    )
    queue(
        slurm, ("7", "FAILED", "NonZeroExitCode", "0", "0:30", "512"), ("9", "CANCELLED", "Dependency", "0", "0", "0")
    )
    states = job_states(read_jobs(run))
    assert [(state.name, state.failed) for state in states] == [("stage1", True), ("cache", False), ("stage2", True)]
    assert states[0].reason == "exit code 2"
    text = shown(run)
    assert "failed" in text and "exit code 2: error: no room: 3 GB needed" in text and "failed (cancelled)" in text


def test_what_squeue_has_forgotten_sacct_knows(slurm, run):
    queue(slurm, ("9", "RUNNING", "None", "0", "1:00", "0"))
    (slurm / "sacct.txt").write_text("7|CANCELLED by 1000|00:10:00|0:15|0\n8_0|TIMEOUT|01:00:00|0:0|1\n")
    states = {state.id: state for state in job_states(read_jobs(run))}
    assert states["7"].state == "CANCELLED" and states["8_0"].state == "TIMEOUT" and states["8_0"].restarts == 1


# SLURM 22.05, which refuses a command that asks for a field that it does not have.
OLD_SACCT = """#!/usr/bin/env bash
[[ "$*" != *Restarts* ]] || { echo 'sacct: fatal: Invalid field requested: "Restarts"' >&2; exit 1; }
echo "7|FAILED|00:10:00|2:0"
"""


def test_a_sacct_that_does_not_count_restarts_tells_the_rest(slurm, run):
    (slurm / "sacct").write_text(OLD_SACCT)
    queue(slurm, ("9", "RUNNING", "None", "0", "1:00", "0"))
    (state,) = [state for state in job_states(read_jobs(run)) if state.id == "7"]
    assert (state.state, state.reason, state.restarts, state.time) == ("FAILED", "exit code 2", 0, "00:10:00")


def test_where_slurm_no_longer_knows_a_job_its_output_does(slurm, run):
    (run / "jobs" / "stage1-7.out").write_text("loading\nerror: no room: 3 GB needed\n")
    (run / "jobs" / "cache-8_0.out").write_text("cache: complete\n")
    (run / "jobs" / "cache-8_1.out").write_text("rank 1 failed: OutOfMemoryError: x\n")
    queue(slurm, ("9", "RUNNING", "None", "0", "1:00", "0"))
    stage1, cache = [line for line in shown(run).splitlines() if "SLURM no longer knows it" in line]
    assert "the last error of its output: error: no room: 3 GB needed" in stage1
    assert "the last error of its output: rank 1 failed: OutOfMemoryError: x" in cache


def test_without_slurm_the_jobs_are_shown_as_not_known(run, monkeypatch):
    (run / "jobs" / "stage1-7.out").write_text("error: no room: 3 GB needed\n")
    monkeypatch.setenv("PATH", str(run))
    text = shown(run)
    assert text.count("SLURM does not answer") == 3 and "error: no room: 3 GB needed" in text


def test_a_squeue_that_does_not_answer_is_told_from_a_job_that_is_gone(slurm, run, monkeypatch):
    jobs = read_jobs(run)
    (slurm / "sacct.txt").write_text("7|COMPLETED|00:10:00|0:0|0\n")
    states = job_states(jobs)  # the stand-in for squeue fails
    assert [state.state for state in states] == ["COMPLETED", NO_ANSWER, NO_ANSWER]
    assert not any(state.active or state.failed for state in states)
    monkeypatch.setattr("pipeline.results.jobs.ANSWER_S", 0.2)
    (slurm / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    assert [state.state for state in job_states(jobs[1:])] == [NO_ANSWER, NO_ANSWER]
    (slurm / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    assert [state.state for state in job_states(jobs[1:2])] == [""]


def test_the_last_error_of_an_output_is_the_one_that_ended_it(tmp_path):
    path = tmp_path / "output"
    assert last_error(path) == ""
    path.write_text("error: of the first start\nok\nrank 1 failed: OutOfMemoryError: x\nsrun: error: y\n")
    assert last_error(path) == "rank 1 failed: OutOfMemoryError: x"


def test_an_arrays_task_has_its_own_output(slurm, run):
    queue(slurm, ("8_3", "RUNNING", "None", "0", "0:01", "0"))
    job = read_jobs(run)[1]
    (state,) = [state for state in job_states([job]) if state.id == "8_3"]
    assert output_of(job, state).name == "cache-8_3.out"


def test_a_percent_sign_of_a_runs_name_is_no_number():
    job = Job("cache", "8", "/runs/100%%job %%a/jobs/cache-%A_%a.out")  # as sbatch gets it
    assert output_of(job, JobState("cache", "8_3", "FAILED")) == Path("/runs/100%job %a/jobs/cache-8_3.out")


def test_a_damaged_file_is_named(run):
    (run / "jobs" / "jobs.json").write_text('[{"name": 1}]')
    with pytest.raises(RecipeError, match=r"jobs.json is not what launch.submit writes .*; remove it"):
        read_jobs(run)


def test_a_run_with_jobs_alone_is_a_run_and_shows_them(slurm, run, capsys):
    queue(slurm, ("7", "PENDING", "Resources", "0", "0:00", "0"))
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "not begun" in said and "Resources" in said and "SLURM jobs" in said


def test_a_training_step_says_how_long_the_rest_takes(made, tmp_path):
    folder = tmp_path / "run"
    write_recipe(folder, made.root)  # 3 updates a step
    line = {
        "step": "verbalize",
        "update": 1,
        "update_s": 1800.0,
        "real_share": 1.0,
        "data_wait": 0.0,
        "loader_workers": 0,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert status(folder)[0][0].progress == "update 1 of 3, 1 h 00 min left"


def test_durations_grow_with_the_seconds():
    texts = [duration_text(seconds) for seconds in (5, 65, 3599, 3600, 93784)]
    assert texts == ["5 s", "1 min", "59 min", "1 h 00 min", "26 h 03 min"]
    assert all(before != after for before, after in pairwise(texts))


def test_watch_goes_on_until_it_is_interrupted(slurm, run, capsys, monkeypatch):
    queue(slurm, ("7", "RUNNING", "None", "0", "0:01", "0"))
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        queue(slurm, ("7", "COMPLETED", "None", "0", "0:09", "0"))
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.results.status.time", SimpleNamespace(sleep=sleep))  # subprocess sleeps, too
    assert main(["status", str(run), "--watch"]) == 0
    assert "done" in capsys.readouterr().out and looks == [10.0, 10.0]


def test_a_cache_says_how_long_the_rest_takes(made, tmp_path, monkeypatch):
    """Ten shards, four of them made, 600 s from the first to the fourth, by however many jobs."""
    folder = tmp_path / "run"
    write_recipe(folder, made.root)
    cache = folder / "cache" / "sampled-1"
    cache.mkdir(parents=True)
    (cache / "cache.json").touch()
    for number in range(4):
        (cache / f"{number:06d}.tar").touch()
        os.utime(cache / f"{number:06d}.tar", (10_000 + 200 * number, 10_000 + 200 * number))
    monkeypatch.setattr("pipeline.results.status.planned", lambda recipe, name: 10)
    assert status(folder)[0][1].progress == "4 of 10 shards, 20 min left"
