"""One recipe over two hosts, under each launcher: pdsh, openmpi, mpirun and torchrun."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from running import ROOT, free_port, tiny_recipe
from tiny import write_data

from pipeline.runtime.faults.watch import BEAT_S
from pipeline.runtime.folder import done, read_metrics

pytestmark = pytest.mark.cluster

HOSTS = Path(__file__).parent / "two_hosts.sh"
RANK_0 = "10.77.0.1"
TRAINING = {"steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("run")
    data = write_data(folder / "data", 16)
    return tiny_recipe(folder, tiny_models, "qwen2_vl", data, verbalize=TRAINING, interact=TRAINING, reinforce=TRAINING)


def start(environment, node: str, *command: object) -> subprocess.Popen:
    return subprocess.Popen(
        [HOSTS, "on", node, *map(str, command)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(*processes: subprocess.Popen) -> tuple[str, list[int]]:
    """(output of all, exit codes), within two minutes: a failing multi-host job may not end by itself."""
    try:
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
        return output, [process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()


def start_deepspeed(environment, launcher: list[str], program: str, *arguments: object) -> subprocess.Popen:
    hostfile = f"{environment['HOSTS_DIR']}/hostfile"
    command = ["deepspeed", "-q", "--hostfile", hostfile, "--master_addr", RANK_0, "--master_port", free_port()]
    return start(environment, "node1", *command, *launcher, f"launch/{program}", *arguments)


def deepspeed(environment, launcher: list[str], program: str, *arguments: object) -> None:
    output, codes = ended(start_deepspeed(environment, launcher, program, *arguments))
    assert codes == [0], output[-6000:]


def ranks_of(recipe: Path) -> dict[str, psutil.Process]:
    """{rank: process} of those that train a recipe, on both hosts: they are one machine's processes."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(recipe) in process.cmdline() and (rank := process.environ().get("RANK")):
                found[rank] = process
    return found


def torchrun(environment, recipe, *before_node2: str) -> tuple[str, list[int]]:
    """Preflight under a torchrun on each host."""
    program = ["launch/preflight.py", "--recipe", recipe]
    port = free_port()
    agents = []
    for rank, prefix in enumerate(((), before_node2)):
        agent = ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank, "--master-addr", RANK_0]
        agents.append(start(environment, f"node{rank + 1}", *prefix, *agent, "--master-port", port, *program))
    return ended(*agents)


def test_deepspeed_over_pdsh_then_openmpi(two_hosts, recipe):
    """Stage 1's two steps, each under another launcher, from one recipe."""
    run = recipe.parent / "run"
    deepspeed(two_hosts, ["--launcher", "pdsh"], "train.py", "--stage", 1, "--only", "verbalize", "--recipe", recipe)
    assert done(run / "verbalize")
    openmpi = ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root"]
    deepspeed(two_hosts, openmpi, "cache.py", "--recipe", recipe)
    assert done(run / "cache")


def test_under_pdsh_a_rank_that_is_killed_ends_those_of_the_other_host(two_hosts, tmp_path, tiny_models, survived):
    """Each node's launcher watches its own ranks only: left alone, the others would wait for ten minutes."""
    training = {**TRAINING, "steps": 1000, "checkpoint_every": 5}
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", write_data(tmp_path / "data", 16), verbalize=training)
    told = (["--launcher", "pdsh"], "train.py", "--stage", 1, "--only", "verbalize", "--recipe", recipe)
    job = start_deepspeed(two_hosts, *told)
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run")) < 8:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2 * BEAT_S)  # what a rank does is known from its beats
    started = ranks_of(recipe)
    started["1"].kill()
    output, codes = ended(job)
    assert 0 not in codes, output
    _, alive = psutil.wait_procs(started.values(), timeout=30)
    assert alive == [], "ranks left behind"
    killed = f"lost its connection to rank 1 on node2 (process {started['1'].pid}), at 'verbalize: update "
    assert f"rank 0 on node1: {killed}" in output, output
    trained = len(read_metrics(tmp_path / "run"))
    deepspeed(two_hosts, *told, "--stop-after", 1)
    updates = [line["update"] for line in read_metrics(tmp_path / "run")]
    assert updates == list(range(1, len(updates) + 1)) and len(updates) <= trained + 1
    survived(kills=1)


def test_preflight_under_mpirun_reaches_both(two_hosts, recipe):
    names = ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
    exported = [word for name in names for word in ("-x", name)]
    mpirun = ["mpirun", "--hostfile", f"{two_hosts['HOSTS_DIR']}/hostfile", "-n", 2, *exported, sys.executable]
    output, codes = ended(start(two_hosts, "node1", *mpirun, "launch/preflight.py", "--recipe", recipe))
    assert codes == [0], output
    assert "2 reached, 1 ranks each: node1, node2" in output and "WRONG" not in output


def test_preflight_under_torchrun_finds_a_folder_that_only_one_host_has(two_hosts, recipe, survived):
    run = recipe.parent / "run"
    run.mkdir(exist_ok=True)
    hidden = ("unshare", "--mount", "bash", "-c", f'mount -t tmpfs none {run} && exec "$@"', "bash")
    output, codes = torchrun(two_hosts, recipe, *hidden)
    assert 0 not in codes, output
    (line,) = [line for line in output.splitlines() if "WRONG" in line]
    assert f"{run} does not show what rank 1 wrote into it on node1" in line and "all nodes must share" in line
    survived(faults=1)
