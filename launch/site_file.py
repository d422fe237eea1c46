"""A site file: what one cluster wants of every job, in YAML, so that nobody edits scripts for it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from pipeline.errors import RecipeError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Container(_Section):
    """The image that ranks run in. It holds python and all packages; the checkout is mounted."""

    runtime: Literal["apptainer", "enroot"]
    """apptainer: each rank runs `apptainer exec --nv IMAGE`. enroot: srun starts the ranks in it (NVIDIA's pyxis)."""
    image: str
    """A .sif file for apptainer; a .sqsh file or a registry's name for enroot."""
    mounts: tuple[str, ...] = ()
    """Folders from outside, as PATH or OUTSIDE:INSIDE: data, models, runs. The folder of submission always is one."""
    options: tuple[str, ...] = ()
    """Further options: of `apptainer exec`, or of srun for enroot."""


class Site(_Section):
    """Every field may be left out; unknown ones are errors."""

    account: str | None = None
    """sbatch --account: whose hours the jobs are."""
    qos: str | None = None
    """sbatch --qos."""
    partition: str | None = None
    """sbatch --partition; --partition on the command line wins."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch for all jobs, such as --constraint=h100 or --exclusive."""
    modules: tuple[str, ...] = ()
    """Environment modules that each job loads first, in this order."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of all ranks, such as NCCL_SOCKET_IFNAME: ib0."""
    container: Container | None = None
    """Left out: the python that launch.submit runs with, which all nodes see."""
    warning_s: Annotated[int, Field(ge=60, le=65535)] = 600
    """Seconds before the time limit at which the ranks are told to checkpoint; a checkpoint must fit in. SLURM may send
    the signal up to a minute earlier."""
    max_requeues: PositiveInt = 100
    """How often a job may go back to the queue, for whatever reason, before its script no longer sends it there: then
    it fails. A job that never gets beyond loading would come back for ever."""
    preflight: bool = True
    """Whether the jobs of stage 1, cache and stage 2 begin with launch/preflight.py, which ends a job where a line says
    WRONG. false: for a cluster that it judges wrongly."""
    gpu_tflops: PositiveFloat = 989.0
    """Peak of one GPU in bf16, 10^12 operations a second, for times from the plan. 989: H100 and H200; A100: 312."""
    network: PositiveFloat = 50.0
    """10^9 bytes a second that a GPU receives from other nodes, for times from the plan."""


def read_site(path: Path | None) -> Site:
    """The site's settings; all defaults without a file. Raises RecipeError with every unknown key and bad value."""
    if path is None:
        return Site()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict):
            raise RecipeError(f"{path}: expected `key: value` lines at the top, found {type(values).__name__}")
        return Site.model_validate(values)
    except FileNotFoundError:
        raise RecipeError(
            f"--site: no file {path}; docs/running_on_a_cluster.md shows one, or leave --site out"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"--site: {path} is not YAML: {error}") from None
    except ValidationError as error:
        lines = [f"  {_problem(problem)}" for problem in error.errors()]
        raise RecipeError(f"{len(lines)} problem(s) in the site file {path}:\n" + "\n".join(lines)) from None


def _problem(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{key}: {problem['msg']}, found {problem['input']!r}"
    fields = Container.model_fields if key.startswith("container.") else Site.model_fields
    close = difflib.get_close_matches(str(problem["loc"][-1]), fields, 1)
    return f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}")
