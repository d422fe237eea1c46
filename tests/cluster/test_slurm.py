"""A real SLURM of two nodes: a whole chain through launch.submit that survives, and what brings a job back."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import ROOT

from pipeline.results.jobs import Job, JobState, job_states, read_jobs
from pipeline.runtime.folder import read_metrics

pytestmark = pytest.mark.cluster

LOCAL_SLURM = Path(__file__).parent / "local_slurm.sh"
# A program as the project's: asked to end, it exits with 75; on its second start it does what its argument says.
RANK = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
started = pathlib.Path(sys.argv[1] + os.environ["RANK"])
if not started.exists():
    started.touch()
    time.sleep(300)
sys.exit(int(sys.argv[2]))
"""


def until(what: str, condition: Callable[[], object], limit_s: float, every_s: float = 0.5) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(every_s)


def state(job: Job) -> JobState:
    return job_states([job])[-1]


def sbatch(slurm, *arguments: object) -> str:
    command = ["sbatch", "--parsable", *map(str, arguments)]
    return subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def submitted(slurm, folder: Path, name: str, code: int, *limit: str) -> Job:
    """A job of two nodes whose ranks wait until they are asked to end, and end with `code` when started again."""
    (folder / "rank.py").write_text(RANK)
    script = folder / f"{name}.sbatch"
    script.write_text(
        "#!/usr/bin/env bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --requeue --open-mode=append\n"
        f"set -euo pipefail\nsource launch/slurm/ranks.sh\nranks {folder}/rank.py {folder}/{name} {code}\n"
    )
    output = f"{folder}/{name}-%j.out"
    return Job(name, sbatch(slurm, *limit, f"--output={output}", script), output)


def test_only_ranks_that_were_asked_to_end_bring_their_job_back(slurm, tmp_path):
    """Three jobs, side by side: one goes on after its time limit's warning, one fails after a signal, one is cancelled.

    SLURM's limits are whole minutes, and it looks every half minute for those whose warning comes due in the next.
    """
    well = submitted(slurm, tmp_path, "well", 0, "--time=1", "--signal=USR1@20")
    badly, cancelled = (submitted(slurm, tmp_path, name, code) for name, code in (("badly", 3), ("cancelled", 0)))
    behind = [f"--dependency=afterok:{badly.id}", "--kill-on-invalid-dep=yes", "--wrap=true"]
    after = Job("after", sbatch(slurm, *behind, "--output=/dev/null"), "/dev/null")
    for job in (badly, cancelled, well):
        until("two ranks to run", lambda job=job: len(list(tmp_path.glob(f"{job.name}[01]"))) == 2, 60)
        if job is cancelled:
            subprocess.run(["scancel", job.id], env=slurm, check=True)
        elif job is badly:
            subprocess.run(["scancel", "--signal=USR1", job.id], env=slurm, check=True)
        until("it to leave its first start", lambda job=job: state(job).state not in ("RUNNING", "COMPLETING"), 60)
    until("the jobs to end", lambda: not any(state(job).active for job in (well, badly, cancelled)), 90)
    assert (state(well).state, state(well).restarts) == ("COMPLETED", 1)
    assert (state(badly).state, state(badly).reason) == ("FAILED", "exit code 3") and state(badly).restarts == 1
    assert (state(cancelled).state, state(cancelled).restarts) == ("CANCELLED", 0)
    until("the job behind the failed one to be cancelled", lambda: state(after).state == "CANCELLED", 60)


def chain(slurm, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The demo's recipe, short, through launch.submit."""
    variables = ("DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE", "OMPI_ALLOW_RUN_AS_ROOT")
    variables += ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "PYTHONPATH")
    site = folder / "site.yaml"
    site.write_text("environment:\n" + "".join(f"  {name}: '{slurm[name]}'\n" for name in variables))
    values = [f"run={folder}/run", f"data.train={folder}/data/train", f"data.held_out={folder}/data/held_out"]
    values += ["verbalize.steps=4", "interact.steps=40", "interact.checkpoint_every=2", "reinforce.steps=4"]
    values += [f"{step}.batch_size=8" for step in ("verbalize", "interact", "reinforce")]
    values += [f"{step}.micro_batch_size=4" for step in ("verbalize", "interact", "reinforce")]
    data = ["--source", "puzzles", "--count", "64", "--held-out-count", "16", "--samples-per-shard", "16"]
    machines = ["--nodes", "2", "--gpus-per-node", "1", "--cpus-per-gpu", "1", "--data-ranks", "2", "--time", "60"]
    command = [
        "-m",
        "launch.submit",
        "--recipe",
        "recipes/demo.yaml",
        "--set",
        *values,
        *machines,
        "--site",
        site,
        *more,
    ]
    return subprocess.run(
        [sys.executable, *map(str, command), "--", *data, "--output", str(folder / "data")],
        cwd=ROOT, env=slurm, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


def kill_a_nodes_daemon(slurm, job: Job) -> None:
    """In the middle of a job: the job goes back to the queue, and begins when the node is back."""
    subprocess.run([LOCAL_SLURM, "kill", "node2"], env=slurm, check=True)
    until("the job to lose its node", lambda: not state(job).state.startswith(("RUNNING", "COMPLETING")), 60)
    assert state(job).state == "PENDING"
    subprocess.run([LOCAL_SLURM, "start", "node2"], env=slurm, check=True)
    until("the job to begin again", lambda: state(job).state == "RUNNING" and state(job).restarts >= 1, 60)


def preempt(slurm, job: Job, run: Path) -> int:
    """In the middle of interact, after some checkpoints; the newest update by then."""
    until("interact to train", lambda: len(read_metrics(run, "interact")) >= 5, 120, 0.1)
    updates = read_metrics(run, "interact")[-1]["update"]
    subprocess.run(["scontrol", "requeue", job.id], env=slurm, check=True)
    until("the job to be requeued", lambda: state(job).restarts == 1, 30)
    return updates


@pytest.mark.timeout(600)
def test_the_demo_goes_through_a_chain_with_a_dead_node_and_a_preemption(slurm, tmp_path, survived):
    run, sent = tmp_path / "run", chain(slurm, tmp_path)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    data, stage1, cache, stage2, evaluate = read_jobs(run)
    try:
        until("stage 1 to begin", lambda: Path(stage1.output.replace("%j", stage1.id)).is_file(), 90)
        assert "in the queue already: stage1" in chain(slurm, tmp_path).stderr
        kill_a_nodes_daemon(slurm, stage1)
        until("stage 2 to begin", lambda: state(stage2).state == "RUNNING", 240)
        before = preempt(slurm, stage2, run)
        until("the chain to end", lambda: not state(evaluate).active, 240)
    except AssertionError as error:
        outputs = [f"{path.name}\n{path.read_text()[-3000:]}" for path in sorted((run / "jobs").glob("*.out"))]
        raise AssertionError("\n".join([str(error), *map(str, job_states(read_jobs(run))), *outputs])) from error
    finally:
        subprocess.run(["scancel", "--user=root"], env=slurm, check=False)
    ends = {found.id: (found.state, found.restarts) for found in job_states(read_jobs(run))}
    assert ends[data.id] == ("COMPLETED", 0) and ends[evaluate.id] == ("COMPLETED", 0), ends
    assert ends[stage1.id][0] == "COMPLETED" and ends[stage1.id][1] >= 1 and ends[stage2.id] == ("COMPLETED", 1), ends
    assert [ends[f"{cache.id}_{task}"][0] for task in range(2)] == ["COMPLETED"] * 2
    assert (run / "student" / "model.safetensors").is_file() and (run / "evaluation.json").is_file()
    updates = [line["update"] for line in read_metrics(run, "interact")]
    assert updates == list(range(1, 41)) and 5 <= before < 40
    output = Path(stage2.output.replace("%j", stage2.id)).read_text()
    assert output.count("ok    hosts:         2 reached, 1 ranks each: node1, node2") == 2  # once a start
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline", "status", run],
        cwd=ROOT,
        env=slurm,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.count("done") >= 8 and "failed" not in shown, shown
    assert "nothing to do: all is done" in chain(slurm, tmp_path).stdout
    survived(kills=1, signals=1)  # of a node's daemon; a preemption in mid-training
