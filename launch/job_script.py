"""A job's sbatch script: the plain script of launch/slurm/ with this run's header and the site's lines in front."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.chain import SCRIPTS, ChainJob
from launch.site_file import Container, Site
from pipeline.results.jobs import FOLDER

SLURM_SCRIPTS = Path(__file__).parent / "slurm"
CHECKOUT = SLURM_SCRIPTS.parents[1]
"""Or the folder of the installed packages."""
PREFLIGHT = 'ranks "$LAUNCH/preflight.py" '
"""How the line of a plain script begins that a site may leave out."""


@dataclass(frozen=True)
class Request:
    """What all jobs of a chain share."""

    run: Path
    recipe: Path
    overrides: Sequence[str]
    partition: str | None
    site: Site
    python: Path
    """The interpreter of jobs without a container."""
    folder: Path
    """Where the jobs start; relative paths of the recipe begin there."""
    data_arguments: Sequence[str] = ()


def script_path(run: Path, job: ChainJob) -> Path:
    """Where a job's script lies in the run folder."""
    return run / FOLDER / f"{job.name}.sbatch"


def output_pattern(run: Path, job: ChainJob) -> str:
    """Where its output goes; SLURM puts numbers for %A, %a and %j, and one % for two."""
    folder = str(run / FOLDER).replace("%", "%%")
    return f"{folder}/{job.name}-{'%A_%a' if job.tasks else '%j'}.out"


def render(job: ChainJob, time: str, request: Request) -> str:
    """The script. It may be read, changed and submitted by hand with sbatch."""
    plain = (SLURM_SCRIPTS / SCRIPTS[job.name]).read_text(encoding="utf-8").splitlines()
    if not request.site.preflight:
        plain = [line for line in plain if not line.startswith(PREFLIGHT)]
    last_option = max(i for i, line in enumerate(plain) if line.startswith("#SBATCH"))
    heading = [
        "#!/usr/bin/env bash",
        f"# Written by launch.submit for {request.run}, from {SLURM_SCRIPTS / SCRIPTS[job.name]}",
        *(f"#SBATCH {_quoted(option)}" for option in options(job, time, request)),
    ]
    site = ["", f"# From the site file and the command line of launch.submit: {job.machines}", *_settings(job, request)]
    return "\n".join([*heading, *site, *plain[last_option + 1 :]]) + "\n"


def options(job: ChainJob, time: str, request: Request) -> list[str]:
    """sbatch's options."""
    site = request.site
    partition = request.partition or site.partition
    named = {"account": site.account, "qos": site.qos, "partition": partition}
    found = [f"--job-name=vlsi-{job.name}", *(f"--{name}={value}" for name, value in named.items() if value)]
    found += [f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks}", f"--cpus-per-task={job.cpus}"]
    found += [f"--gpus-per-node={job.gpus}"] if job.gpus else []
    found += [f"--array=0-{job.tasks - 1}"] if job.tasks else []
    found += [f"--time={time}", f"--chdir={request.folder}", f"--output={output_pattern(request.run, job)}"]
    found += ["--open-mode=append", "--requeue"]
    # SLURM tells job steps only, and the data job's mpirun is none.
    found += [] if job.name == "data" else [f"--signal=USR1@{site.warning_s}"]
    return [*found, *site.sbatch]


def _quoted(option: str) -> str:
    """--NAME=VALUE as sbatch reads it in a script: an unquoted value ends at a space and at #.

    A value that the site file has in quotes of its own stays as it is.
    """
    name, _, value = option.partition("=")
    if value.startswith(('"', "'")) or not re.search(r"""[\s#"'\\]""", value):
        return option
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'{name}="{escaped}"'


def _settings(job: ChainJob, request: Request) -> list[str]:
    site = request.site
    lines = ["unset MASTER_ADDR MASTER_PORT  # sbatch hands on the submitting shell's; those of the site file count"]
    lines += [_module_line(module) for module in site.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += _container_lines(site.container, request.folder) if site.container else [_path_line(request.python)]
    lines += _code_lines(site.container)
    lines += [f"LAUNCH={shlex.quote(str(SLURM_SCRIPTS.parent))}", f"MAX_REQUEUES={site.max_requeues}"]
    lines += ["REQUEUES_SET_BY='max_requeues of the site file'"]
    lines += _variables(job, request)
    return lines


def _variables(job: ChainJob, request: Request) -> list[str]:
    if job.name == "data":
        return [f"set -- {shlex.join(request.data_arguments)}"]
    if job.name == "evaluate":
        return [f"RUN={shlex.quote(str(request.run))}"]
    lines = [f"RECIPE={shlex.quote(str(request.recipe))}"]
    lines += {"stage1": ["ONLY='--only verbalize'"], "cache": [f"TASKS={job.tasks}"]}.get(job.name, [])
    return [*lines, f"overrides=(--set {shlex.join(request.overrides)})"] if request.overrides else lines


def _module_line(module: str) -> str:
    """`set -e` stands behind these lines: module systems are shell functions, not written for it."""
    said = shlex.quote(f"error: module load {module}, of the site file's modules, has failed")
    return f"module load {shlex.quote(module)} || {{ echo {said}; exit 1; }}"


def _path_line(python: Path) -> str:
    return f'export PATH={shlex.quote(str(python.parent))}:"$PATH"'


def _code_lines(container: Container | None) -> list[str]:
    """Ranks import this checkout: `python LAUNCH/train.py` would take what is installed, of any version."""
    if not (CHECKOUT / "setup.cfg").is_file():
        return []
    export = f'export PYTHONPATH={shlex.quote(str(CHECKOUT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    # Inside once more: an image, or an option of its runtime, may not let variables through.
    inside = shlex.join(["sh", "-c", f'{export}; exec "$@"', "sh"])
    return [export, *([f"in_container+=({inside})"] if container else [])]


def _container_lines(container: Container, folder: Path) -> list[str]:
    mounts = [str(folder), *container.mounts]
    if container.runtime == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        command = ["apptainer", "exec", "--nv", *binds, *container.options, container.image]
        return [f"in_container=({shlex.join(command)})"]
    both = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    command = [f"--container-image={container.image}", f"--container-mounts={both}", f"--container-workdir={folder}"]
    return [f"srun_options=({shlex.join([*command, *container.options])})"]
