"""Run the real programs on tiny models: recipes as dicts, processes under the deepspeed launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def tiny_recipe(folder: Path, models: dict, kind: str, train: Path, zero: str = "zero3_cpu", **sections: Any) -> Path:
    """A recipe of a few updates a step; sections override or add, as in interact={"steps": 3}."""
    training = {"steps": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 3e-3}
    recipe: dict[str, Any] = {
        "run": str(folder / "run"),
        "precision": "fp32",
        "deepspeed": str(ROOT / "ds_configs" / f"{zero}.json"),
        "data": {"train": str(train), "workers": 0},
        "teacher": {"path": str(models[kind, "teacher"]), "layers": [1, 2, 3, 4]},
        "student": {"path": str(models[kind, "student"]), "layers": [1, 2]},
        "verbalize": dict(training),
        "cache": {"codec": {"name": "sampled", "points": 16}, "batch_tokens": 512},
        "interact": dict(training),
        "reinforce": dict(training),
    }
    for name, value in sections.items():
        if isinstance(value, dict):
            recipe[name] |= value
        else:
            recipe[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def cache_folder(run: Path) -> Path:
    """The one teacher cache of a run."""
    (path,) = (file.parent for file in (run / "cache").glob("*/cache.json"))
    return path


def deepspeed(ranks: int, script: str, *arguments: object, check: int | None = 0) -> str:
    """Run a program of launch/ under DeepSpeed's launcher; returns what it printed. `check`: the expected exit code."""
    program = [
        str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_accelerators", str(ranks),
        "--master_port", str(_free_port()), f"launch/{script}", *map(str, arguments),
    ]  # fmt: skip
    return run(program, check)


def python(*arguments: object, check: int | None = 0) -> str:
    """Run `python ...` in the checkout; returns what it printed."""
    return run([sys.executable, *map(str, arguments)], check)


def run(program: list[str], check: int | None = 0) -> str:
    """Run a program to its end, within four minutes; where the exit code is another, its output is in the failure."""
    # The venv's own ninja and mpirun first, whatever shell the tests were started from.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    if check is not None:
        # The launcher turns every failure of a rank into its own exit code, so any non-zero stands for any other.
        assert bool(done.returncode) == bool(check), f"exit code {done.returncode}\n{output[-6000:]}"
    return output


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
