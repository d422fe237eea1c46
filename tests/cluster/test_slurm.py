"""The SLURM job scripts: shard ranges of a cache array, and ranks on a real SLURM of one node."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
ONE_NODE = ROOT / "tests" / "cluster" / "one_node_slurm.sh"

sys.path.insert(0, str(SCRIPTS))
from shard_range import shard_range  # noqa: E402  (a script beside the job scripts, not a package)

# Exit as the project's ranks do: at a normal interpreter exit a gloo thread may still be running and abort the process.
PROGRAM = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()} sums {int(total)}", flush=True)
dist.barrier()
os._exit(0)
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


def array_task(tmp_path, task: int, shards: int = 16, **variables: str) -> tuple[str, int]:
    """(output, exit code) of the array's script, with `srun` replaced by `echo`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{}] * shards}))
    (tmp_path / "recipe.yaml").write_text(f"data: {{train: {tmp_path}}}")
    environment = {key: value for key, value in os.environ.items() if key != "TASKS"}
    environment |= {"RECIPE": str(tmp_path / "recipe.yaml"), "SLURM_CPUS_PER_TASK": "1", **variables}
    environment |= {
        "SLURM_ARRAY_TASK_ID": str(task),
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = SCRIPTS / "cache_array.sbatch"
    done = subprocess.run(["bash", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.returncode


def test_a_task_of_an_array_reads_its_part(tmp_path):
    output, code = array_task(tmp_path, 7, SLURM_ARRAY_TASK_COUNT="16")
    assert code == 0 and "launch/cache.py --recipe" in output and output.strip().endswith("--shards 7-7")


def test_a_task_submitted_again_alone_needs_the_number_of_tasks(tmp_path):
    output, code = array_task(tmp_path, 7, SLURM_ARRAY_TASK_COUNT="1")
    assert code == 2 and "Traceback" not in output
    assert output.startswith(
        "expected a task from 0 to 0, found 7; where parts run again, say of how many they are: TASKS="
    )


def test_a_task_submitted_again_alone_reads_the_same_part(tmp_path):
    output, code = array_task(tmp_path, 7, SLURM_ARRAY_TASK_COUNT="1", TASKS="16")
    assert code == 0 and output.strip().endswith("--shards 7-7")


def test_as_rank_outside_of_srun_names_the_command():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        [SCRIPTS / "as_rank.sh", "true"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Run: srun launch/slurm/as_rank.sh COMMAND" in done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.s*")))
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)


def test_submitting_without_a_recipe_names_the_command():
    environment = {key: value for key, value in os.environ.items() if key != "RECIPE"}
    done = subprocess.run([SCRIPTS / "submit_chain.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Run: RECIPE=recipes/NAME.yaml launch/slurm/submit_chain.sh" in done.stderr


@pytest.fixture(scope="module")
def slurm():
    """Environment variables of a one-node SLURM. One that is already running is used and left running."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("needs root and the packages slurmctld, slurmd, slurm-client and munge")
    directory = Path(os.environ.get("SLURM_DIR", "/tmp/one-node-slurm"))
    ours = not (directory / "slurmctld.pid").exists()
    started = subprocess.run([ONE_NODE, "up"], stdout=subprocess.PIPE, text=True, check=True).stdout
    yield os.environ | {"SLURM_CONF": started.strip().partition("=")[2]}
    if ours:
        subprocess.run([ONE_NODE, "down"], check=True)


def test_two_tasks_of_a_slurm_job_find_each_other(slurm, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "job.sbatch").write_text(
        "#!/usr/bin/env bash\n"
        "#SBATCH --nodes=1 --ntasks-per-node=2 --gpus-per-node=2\n"
        f"srun --kill-on-bad-exit=1 {SCRIPTS}/as_rank.sh {sys.executable} {tmp_path}/program.py\n"
    )
    output = tmp_path / "output.txt"
    subprocess.run(
        ["sbatch", "--wait", f"--output={output}", tmp_path / "job.sbatch"],
        env=slurm,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    assert sorted(output.read_text().split("\n"))[-2:] == ["rank 0 of 2 sums 3", "rank 1 of 2 sums 3"]
