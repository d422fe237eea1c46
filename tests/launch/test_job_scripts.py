"""The plain job scripts of launch/slurm/: shard ranges of a cache array, what requeues a job, what a user forgets."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import REQUEUE_EXIT
from pipeline.results.jobs import last_error

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
JOBS = sorted(path.name for path in SCRIPTS.glob("*.sbatch"))

sys.path.insert(0, str(SCRIPTS))
from shard_range import shard_range  # noqa: E402  (a script beside the job scripts, not a package)

# Drops srun's own options and as_rank.sh; runs shard_range.py, shows what ranks would run, and ends as told.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* || "$1" == bash || "$1" == */as_rank.sh ]]; do shift; done
case "$*" in
  *shard_range.py*) [ -z "${FIRST:-}" ] || exit "$FIRST"; exec "$@" ;;
  true) exit "${NODES_GONE:-0}" ;;
  *) echo "$@"; case "$*" in *preflight*) exit 0 ;; *) exit "${CODE:-0}" ;; esac ;;
esac
"""
# SLURM ends a job's script when the job goes back to the queue. The first BUSY times it does not answer.
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) echo node1 ;;
  requeue)
    echo >> "$0.tries"
    [ "$(wc -l < "$0.tries")" -gt "${BUSY:-0}" ] || { echo "Socket timed out on send/recv operation"; exit 1; }
    echo "scontrol $*"
    [ -n "${OUTLIVED:-}" ] || kill -TERM "$PPID"
    ;;
esac
"""


@pytest.mark.parametrize("shards", [0, 1, 5, 16, 17, 100])
@pytest.mark.parametrize("tasks", [1, 3, 16])
def test_the_parts_of_an_array_are_every_shard_once(shards, tasks):
    parts = [shard_range(shards, task, tasks) for task in range(tasks)]
    read = []
    for part in filter(None, parts):
        first, last = map(int, part.split("-"))
        read += range(first, last + 1)
    assert read == list(range(shards))


def test_a_task_outside_its_array_is_refused():
    with pytest.raises(ValueError, match="expected a task from 0 to 3, found 4"):
        shard_range(10, 4, 4)


def run_script(tmp_path, script: str, shards: int = 16, **variables: str) -> tuple[str, int]:
    """(output, exit code) of a job script, with stand-ins for srun and scontrol."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("deepspeed", ""), ("sleep", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{}] * shards}))
    recipe = f"run: {tmp_path}/run\ndata: {{train: {tmp_path}}}\nteacher: {{path: t}}\nstudent: {{path: s}}\n"
    recipe += "".join(f"{step}: {{steps: 1, batch_size: 1}}\n" for step in ("verbalize", "interact", "reinforce"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    environment = {key: value for key, value in os.environ.items() if key not in ("TASKS", "RECIPE", "RUN", "LAUNCH")}
    environment |= {"RECIPE": str(tmp_path / "recipe.yaml"), "RUN": str(tmp_path), **variables}
    environment |= {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", SCRIPTS / script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout + done.stderr, done.returncode


@pytest.mark.parametrize(
    ("tasks", "code", "expected"),
    [
        ({"SLURM_ARRAY_TASK_COUNT": "16"}, 0, "--shards 7-7\n"),
        ({"SLURM_ARRAY_TASK_COUNT": "1", "TASKS": "16"}, 0, "--shards 7-7\n"),  # submitted again, alone
        (
            {"SLURM_ARRAY_TASK_COUNT": "1"},
            2,
            "expected a task from 0 to 0, found 7; where parts run again, say of how many they are: TASKS=",
        ),
    ],
)
def test_a_task_of_an_array_reads_its_part(tmp_path, tasks, code, expected):
    output, found = run_script(tmp_path, "cache_array.sbatch", SLURM_ARRAY_TASK_ID="7", **tasks)
    assert found == code and expected in output and "Traceback" not in output, output
    assert ("launch/preflight.py" in output) == (code == 0)  # the first step of a job that has work


@pytest.mark.parametrize("left_with", [REQUEUE_EXIT, 128 + signal.SIGUSR1])
@pytest.mark.parametrize("job", ["stage2.sbatch", "evaluate.sbatch"])
def test_ranks_that_were_asked_to_end_bring_their_job_back(tmp_path, job, left_with):
    output, code = run_script(tmp_path, job, CODE=str(left_with))
    assert output.splitlines()[-1] == "scontrol requeue 7" and code == -15  # ended by SLURM, not by itself


def test_variables_that_a_user_has_exported_are_no_lists_of_the_scripts(tmp_path):
    """SLURM gives a job the environment that it was submitted from."""
    exported = {"overrides": "--set run=other", "in_container": "apptainer", "srun_options": "--overlap"}
    output, code = run_script(tmp_path, "stage2.sbatch", **exported)
    assert code == 0 and "launch/train.py --stage 2" in output
    assert not any(word in output for word in ("other", "apptainer", "overlap"))


@pytest.mark.parametrize("code", [1, 2, 137, 143])
def test_ranks_that_have_failed_do_not(tmp_path, code):
    output, found = run_script(tmp_path, "stage2.sbatch", CODE=str(code))
    assert found == code and "requeue" not in output


def test_a_failure_with_a_node_gone_brings_the_job_back(tmp_path):
    """Seen on the real SLURM: a node's daemon died as the ranks were started, and the job failed with 233."""
    output, code = run_script(tmp_path, "stage2.sbatch", CODE="233", NODES_GONE="1")
    assert "not every node of the job runs as much as 'true': a node is gone" in output
    assert output.splitlines()[-1] == "scontrol requeue 7" and code == -15


@pytest.mark.parametrize(("left_with", "nodes_gone"), [(128 + signal.SIGUSR1, "0"), (1, "1")])
def test_so_does_the_first_command_of_a_cache_job(tmp_path, left_with, nodes_gone):
    task = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "16"}
    output, code = run_script(tmp_path, "cache_array.sbatch", FIRST=str(left_with), NODES_GONE=nodes_gone, **task)
    assert output.splitlines()[-1] == "scontrol requeue 7" and code == -15 and "--shards" not in output


@pytest.mark.parametrize(("left_with", "nodes_gone"), [(REQUEUE_EXIT, "0"), (233, "1")])
def test_a_job_that_comes_back_for_ever_is_ended(tmp_path, left_with, nodes_gone):
    """One that needs longer to load than its time limit would otherwise never stop."""
    counts = {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}
    output, code = run_script(tmp_path, "stage2.sbatch", CODE=str(left_with), NODES_GONE=nodes_gone, **counts)
    assert code == left_with and "scontrol requeue" not in output
    said = "error: job 7 has gone back to the queue 3 times, as often as the variable MAX_REQUEUES allows"
    assert said in output and last_error_of(output, tmp_path).startswith(said)  # what `status` shows
    counts["MAX_REQUEUES"] = "4"
    (tmp_path / "once_more").mkdir()
    output, _ = run_script(
        tmp_path / "once_more", "stage2.sbatch", CODE=str(left_with), NODES_GONE=nodes_gone, **counts
    )
    assert output.splitlines()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("job", ["stage2.sbatch", "evaluate.sbatch"])
def test_a_busy_slurm_is_asked_again_to_take_the_job_back(tmp_path, job):
    """A job that fails because of one socket that timed out takes the chain behind it along."""
    output, code = run_script(tmp_path, job, CODE=str(REQUEUE_EXIT), BUSY="3")
    assert output.count("Socket timed out") == 3
    assert output.splitlines()[-1] == "scontrol requeue 7" and code == -15


def test_a_slurm_that_never_takes_the_job_back_is_said_with_the_ranks_code(tmp_path):
    output, code = run_script(tmp_path, "stage2.sbatch", CODE=str(REQUEUE_EXIT), BUSY="99")
    assert code == REQUEUE_EXIT and output.count("Socket timed out") == 10
    assert last_error_of(output, tmp_path).startswith("error: SLURM did not take job 7 back in 10 tries")


def test_a_script_that_slurm_does_not_end_has_not_ended_well(tmp_path):
    """With exit code 0 the jobs behind it would begin, on half of its work."""
    output, code = run_script(tmp_path, "stage2.sbatch", CODE=str(REQUEUE_EXIT), OUTLIVED="1")
    assert output.splitlines()[-1] == "scontrol requeue 7" and code == REQUEUE_EXIT


def last_error_of(output: str, folder: Path) -> str:
    (folder / "job.out").write_text(output)
    return last_error(folder / "job.out")


def test_as_rank_outside_of_srun_names_the_command():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        [SCRIPTS / "as_rank.sh", "true"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Run: srun launch/slurm/as_rank.sh COMMAND" in done.stderr


@pytest.mark.parametrize("script", [*JOBS, "as_rank.sh", "ranks.sh"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)


@pytest.mark.parametrize("script", [name for name in JOBS if name != "data_prep.sbatch"])
def test_a_script_without_its_recipe_names_the_command_and_asks_for_a_time(script):
    environment = {key: value for key, value in os.environ.items() if key not in ("RECIPE", "RUN")}
    done = subprocess.run(["bash", SCRIPTS / script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and f"launch/slurm/{script}" in done.stderr and "sbatch --time=" in done.stderr


@pytest.mark.parametrize("script", JOBS)
def test_scripts_have_no_time_of_their_own_and_come_back(script):
    """A fixed time was too short for the shipped recipe; SLURM would not start a job again by itself."""
    text = (SCRIPTS / script).read_text()
    assert "#SBATCH --time" not in text and "#SBATCH --requeue" in text
