"""The scripts that launch.submit writes, as sbatch and bash read them: odd characters, modules, images, variables."""

import os
import re
import subprocess

import pytest
from running import ROOT
from submitting import put, run, script

from pipeline.results.jobs import JobState, output_of, read_jobs

SCONTROL = """#!/usr/bin/env bash
echo node1
"""
# Keeps what the ranks would get; prints a range of shards where it is asked for one.
SRUN = """#!/usr/bin/env bash
echo "$MASTER_ADDR ${MASTER_PORT:-none} $*" >> "$(dirname "$0")/started.txt"
echo 0-0
"""


def run_job(folder, script, **exported) -> str:
    """What a rendered script starts through srun, with the variables of the shell that submitted it."""
    put(folder, srun=SRUN, scontrol=SCONTROL)
    variables = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", **exported}
    subprocess.run(["bash", script], env=os.environ | variables, check=True, stdout=subprocess.DEVNULL)
    return (folder / "started.txt").read_text()


@pytest.mark.parametrize(
    ("name", "told"), [("stage1", "--only verbalize"), ("cache", "--tasks 4"), ("stage2", "--stage 2")]
)
def test_variables_of_the_shell_that_submits_change_no_job(slurm, recipe, tmp_path, name, told):
    """sbatch hands them on: with TASKS=16 from an earlier day four jobs made a quarter of the cache, and ended well."""
    assert run(recipe, "--dry-run") == 0
    exported = {"TASKS": "16", "ONLY": "", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    started = run_job(slurm, tmp_path / "run" / "jobs" / f"{name}.sbatch", **exported)
    assert told in started and all(line.startswith("node1 none ") for line in started.splitlines()), started


def sbatch_reads(line: str) -> list[str]:
    """The options of an #SBATCH line, by sbatch's own rules: a backslash keeps the next character, also in quotes."""
    words = re.findall(r"""(?:\\.|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^\s#"'\\])+|#.*""", line.removeprefix("#SBATCH"))
    return [re.sub(r"""\\(.)|["']""", r"\1", word) for word in words if not word.startswith("#")]


def test_sbatch_reads_paths_and_options_with_odd_characters(slurm, recipe, tmp_path, monkeypatch):
    odd = tmp_path / 'my "odd" #1 \\ folder'
    odd.mkdir()
    monkeypatch.chdir(odd)
    (odd / "site.yaml").write_text(
        "account: 'my lab'\nsbatch: ['--comment=two words', '--constraint=\"[a|b]\"', '-C ib', --exclusive]\n"
    )
    assert run(recipe, "--site", str(odd / "site.yaml"), "--set", f"run={tmp_path}/a run of 5%job") == 0
    text = (tmp_path / "a run of 5%job" / "jobs" / "cache.sbatch").read_text()
    options = [option for line in text.splitlines() if line.startswith("#SBATCH") for option in sbatch_reads(line)]
    wanted = {f"--chdir={odd}", f"--output={tmp_path}/a run of 5%%job/jobs/cache-%A_%a.out", "--account=my lab"}
    assert wanted | {"--comment=two words", "--constraint=[a|b]", "-C", "ib", "--exclusive"} <= set(options)
    (cache,) = [job for job in read_jobs(tmp_path / "a run of 5%job") if job.name == "cache"]
    assert output_of(cache, JobState("cache", "2_1", "")) == tmp_path / "a run of 5%job" / "jobs" / "cache-2_1.out"


def test_a_module_that_does_not_load_ends_the_job_with_its_name(recipe, tmp_path):
    (tmp_path / "site.yaml").write_text("modules: [gcc/13, cuda/13.0]\n")
    assert run(recipe, "--site", str(tmp_path / "site.yaml"), "--dry-run") == 0
    modules = 'module() { [ "$2" = gcc/13 ]; }; export -f module; exec bash "$1"'
    done = subprocess.run(
        ["bash", "-c", modules, "-", tmp_path / "run" / "jobs" / "stage2.sbatch"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == "error: module load cuda/13.0, of the site file's modules, has failed\n"


# Runs what srun would; with INSIDE in a container, which lets no variable through.
SRUN_IN_CONTAINER = """#!/usr/bin/env bash
while [[ "$1" == --* || "$1" == bash || "$1" == */as_rank.sh ]]; do shift; done
PATH="$(dirname "$0"):$PATH"
[ -n "${INSIDE:-}" ] || exec "$@"
exec env -i PATH="$PATH" PYTHONPATH=/in/image "$@"
"""
APPTAINER = """#!/usr/bin/env bash
until [[ "$1" == *.sif ]]; do shift; done
exec env -i PATH="$PATH" PYTHONPATH=/in/image "${@:2}"
"""
PYTHON = """#!/usr/bin/env bash
echo "$PYTHONPATH" >> "$(dirname "$0")/paths.txt"
"""


@pytest.mark.parametrize(
    ("container", "inside", "behind"),
    [("", "", "/own"), ("apptainer, image: /i.sif", "", "/in/image"), ("enroot, image: lab/i", "1", "/in/image")],
)
def test_ranks_import_the_checkout_also_in_an_image_that_has_the_packages(
    slurm, recipe, tmp_path, container, inside, behind
):
    """The programs came from the checkout and what they import from the image: two versions at once."""
    (tmp_path / "site.yaml").write_text(f"container: {{runtime: {container}}}" if container else "")
    assert run(recipe, "--site", str(tmp_path / "site.yaml"), "--dry-run") == 0
    put(slurm, srun=SRUN_IN_CONTAINER, apptainer=APPTAINER, python=PYTHON, scontrol=SCONTROL)
    variables = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7", "PYTHONPATH": "/own", "INSIDE": inside}
    subprocess.run(["bash", tmp_path / "run" / "jobs" / "stage2.sbatch"], env=os.environ | variables, check=True)
    assert (slurm / "paths.txt").read_text() == f"{ROOT}:{behind}\n" * 2  # the preflight and the training


def test_installed_packages_are_those_of_the_python_that_runs(recipe, tmp_path, monkeypatch):
    """Their folder has torch and all else beside them, which an image brings itself."""
    monkeypatch.setattr("launch.job_script.CHECKOUT", tmp_path)
    assert run(recipe, "--dry-run") == 0 and "PYTHONPATH" not in script(tmp_path, "stage2")
