"""What one rank finds on its machine. Only looks: whether it is good enough is judged elsewhere."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_prep.storage import read_bytes
from pipeline.recipe.schema import Recipe
from pipeline.runtime.node import available_memory
from pipeline.runtime.versions import commit, packages

SHARED_MEMORY = Path("/dev/shm")
"""Through it loader workers hand batches to their rank."""
SIDE = 1024
"""Of the matrices that a device multiplies to show that it computes."""


@dataclass(frozen=True)
class Facts:
    """One rank's machine."""

    rank: int
    host: str
    local_rank: int
    commit: str
    versions: Mapping[str, str]
    """Python's and the packages'."""
    paths: Mapping[str, str]
    """Field of the recipe -> hash of what stands there; where nothing can be read, why, after "no "."""
    disk_free: int | None
    """Bytes that the user may still write in the run's folder; None where it cannot be told."""
    memory: int
    """Bytes of the node's memory that this rank's control groups, such as the job's, let it take."""
    shared_memory: int
    """Bytes free in /dev/shm."""
    device: str
    """cpu, or a GPU's name."""
    device_id: str = ""
    """What tells two GPUs of a node apart."""
    device_free: int | None = None
    """Bytes free on the GPU; None on a CPU."""
    device_problem: str = ""
    unwritable: Mapping[str, str] = field(default_factory=dict)
    """Field of the recipe -> why this rank cannot share its folder with the others; empty where it can."""


def look(recipe: Recipe, paths: Mapping[str, Path], rank: int, device: str) -> Facts:
    """What this rank finds."""
    name, number, free, problem = _device(device)
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        commit=commit(),
        versions={"python": platform.python_version(), **packages()},
        paths={key: _fingerprint(path) for key, path in paths.items()},
        disk_free=_free(_existing(recipe.run)),
        memory=available_memory(),
        shared_memory=_free(SHARED_MEMORY) or 0,
        device=name,
        device_id=number,
        device_free=free,
        device_problem=problem,
    )


def paths_of(recipe: Recipe, steps: list[str]) -> dict[str, Path]:
    """The file that stands for each path of the recipe that the steps read: a manifest, a model's config.json."""
    found = {"data.train": recipe.data.train / "manifest.json", "student.path": recipe.student.path / "config.json"}
    if {"verbalize", "cache"} & set(steps):
        found["teacher.path"] = recipe.teacher.path / "config.json"
    for key, other in recipe.left_to_another_run().values():
        found[key] = other / "recipe.yaml"
    own = {step: folder for step, folder in recipe.own_folders().items() if step in steps}
    found |= {f"{step}.train": folder / "manifest.json" for step, folder in own.items()}
    for step in steps:
        config = recipe.deepspeed_of(getattr(recipe, step))
        found[config.name] = config
    if steps == ["cache"]:  # a cache job needs the teacher's folder only
        del found["student.path"]
    return found


def written_by(recipe: Recipe, steps: list[str]) -> dict[str, Path]:
    """{field of the recipe: folder that the steps write, on a disk or behind a URL}."""
    found = {"run": recipe.run}
    if "cache" in steps and recipe.cache.folder is not None:
        found["cache.folder"] = recipe.cache.folder
    return found


def _fingerprint(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        return f"no {path} ({error.strerror})"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _device(device: str) -> tuple[str, str, int | None, str]:
    """(name, id, free bytes, problem). A GPU multiplies two matrices: broken ones raise here, or come out wrong."""
    if device == "cpu":
        return "cpu", "", None, ""
    found = torch.cuda.get_device_properties(device)
    number = str(getattr(found, "uuid", device))
    try:
        free, _ = torch.cuda.mem_get_info(device)
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randint(-4, 5, (SIDE, SIDE), generator=generator).float() for _ in range(2))
        # Small whole numbers: exact in bf16 as in float32, so any difference is the device's fault.
        made = (left.to(device).bfloat16().float() @ right.to(device).bfloat16().float()).cpu()
        wrong = int((made != left @ right).sum())
    except RuntimeError as error:
        return found.name, number, None, str(error).splitlines()[0]
    return found.name, number, free, f"{wrong} of {SIDE * SIDE} sums of a product are wrong" if wrong else ""
