"""`python -m pipeline env`: versions and devices for a bug report, even if parts are missing or broken."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.recipe.resolve import SHIPPED
from pipeline.runtime.versions import PROJECT, commit, packages, version


def environment() -> dict[str, Any]:
    """{"project", "system", "packages", "devices", "kernels", "mpi", "shipped"}.

    What cannot be found is a text that says why.
    """
    return {
        "project": {"version": version(PROJECT), "commit": commit(), "folder": str(SHIPPED)},
        "system": {
            "python": sys.version.split()[0],
            "executable": sys.executable,
            "platform": platform.platform(),
            "cores": os.cpu_count(),
        },
        "packages": packages(),
        "devices": _attempt(_devices),
        "kernels": _attempt(_kernels),
        "mpi": _attempt(_mpi),
        "shipped": {"recipes": str(SHIPPED / "recipes"), "ds_configs": str(SHIPPED / "ds_configs")},
    }


def show(as_json: bool) -> None:
    """Print the environment, as a table or as JSON."""
    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for section, values in found.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            print(f"{section:<10}{name:<22}{value}")


def _attempt(find: Any) -> Any:
    try:
        return find()
    except Exception as error:  # a broken package must be reported, not raised
        return f"not known: {type(error).__name__}: {error}"


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or "none in this torch"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    found["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "not set")
    return found


def _kernels() -> dict[str, str]:
    """The kernels that a run in bf16 would use here. On a GPU this checks them, as a run does."""
    import torch

    from pipeline.loss import kernels

    asked, _ = kernels.setting()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        kernels.VARIABLE: os.environ.get(kernels.VARIABLE, "not set"),
        "in use": str(kernels.find(asked, device, torch.bfloat16)),
    }


def _mpi() -> str:
    program = Path(sys.executable).with_name("mpirun")
    path = str(program) if program.is_file() else shutil.which("mpirun")
    if path is None:
        return "no mpirun"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{path}: {lines[0] if lines else 'it does not say its version'}"
