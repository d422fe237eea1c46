"""Two hosts and a SLURM over them, started once and removed whatever happens."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from running import ROOT

HERE = Path(__file__).parent
HOSTS, SLURM = HERE / "two_hosts.sh", HERE / "local_slurm.sh"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "sshd", "pdsh", "ip", "nsenter")


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory):
    """Environment variables of node1, from which node2 is reached by ssh; HOSTS_DIR has the hostfile."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and the packages of tests/install_debian.sh; missing: {missing}")
    folder = tmp_path_factory.mktemp("hosts")
    variables = {
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{path}",
        "PYTHONPATH": str(ROOT),
        "HOSTS_DIR": str(folder),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    # What `deepspeed --hostfile` hands to the ranks; users keep it as .deepspeed_env in the folder where they start.
    (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | variables
    environment["DS_ENV_FILE"] = str(folder / "deepspeed_env")
    try:
        subprocess.run([HOSTS, "up"], env=environment, check=True, timeout=60)
        yield environment
    finally:
        subprocess.run([HOSTS, "down"], env=environment, check=True, timeout=60)


@pytest.fixture(scope="session")
def slurm(two_hosts):
    """Environment variables with which sbatch finds a SLURM of the two hosts."""
    # Always the same folder: it has the process ids of a SLURM that a killed test left behind.
    environment = two_hosts | {"SLURM_DIR": f"{tempfile.gettempdir()}/vlsi-test-slurm"}
    subprocess.run([SLURM, "down"], env=environment, check=True, timeout=120)
    try:
        started = subprocess.run([SLURM, "up", "2"], env=environment, stdout=subprocess.PIPE, text=True, check=True)
        environment["SLURM_CONF"] = started.stdout.strip().partition("=")[2]
        os.environ["SLURM_CONF"] = environment["SLURM_CONF"]  # for job_states, which runs in this process
        yield environment
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([SLURM, "down"], env=environment, check=True, timeout=120)
