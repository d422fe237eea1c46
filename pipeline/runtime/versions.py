"""Which code, packages and machine a step ran with: found out, and kept in the run's folder when it begins."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.schema import parse_json
from pipeline.recipe.resolve import SHIPPED
from pipeline.runtime.folder import done, write_json

PROJECT = "vlsi-distillation"
"""As pip knows it. `vlsi` on PyPI is another project."""
FOLDER = "environment"
"""Folder of a run: one JSON file for each step that has begun, by the step's name."""


def version(name: str) -> str:
    """The version of an installed package; "not installed" where it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def packages() -> dict[str, str]:
    """Versions of the direct requirements, including those of extras."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return {}
    names = sorted({re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in lines})
    return {name: version(name) for name in names}


def commit() -> str:
    """The commit of the checkout that this code runs from, followed by + if files differ from it."""
    if not (SHIPPED / ".git").exists() or shutil.which("git") is None:
        return "not known: no git checkout"
    described = subprocess.run(
        ["git", "-C", str(SHIPPED), "describe", "--always", "--abbrev=12", "--dirty=+"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or f"not known: {described.stderr.strip()}"


def keep_environment(run: Path, step: str, ranks: int, device: str) -> None:
    """Write RUN/environment/STEP.json, unless the step is complete: its result came from what ran then.

    device: that of rank 0, as torch names it. A step that goes on has the environment of its newest invocation.
    """
    if done(run / step) is None:
        write_json(run / FOLDER / f"{step}.json", _environment(ranks, device))


def read_environment(run: Path, step: str) -> dict[str, Any] | None:
    """What `keep_environment` wrote; None where the step has not begun, or before there were such files."""
    path = run / FOLDER / f"{step}.json"
    return parse_json(path.read_bytes()) if path.is_file() else None


def _environment(ranks: int, device: str) -> dict[str, Any]:
    return {
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "version": version(PROJECT),
        "commit": commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "device": _device_name(device),
        "ranks": ranks,
        "packages": {name: found for name, found in packages().items() if found != "not installed"},
    }


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
