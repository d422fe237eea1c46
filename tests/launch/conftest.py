"""A recipe without models, and stand-ins for the SLURM that it is submitted to."""

import os

import pytest
import yaml
from submitting import SBATCH, SQUEUE, put
from tiny import write_data


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands; the folder that they lie in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    put(folder, sbatch=SBATCH, squeue=SQUEUE)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def recipe(tmp_path):
    write_data(tmp_path / "data", 3, shards=3)
    values = {
        "run": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "data"), "held_out": str(tmp_path / "held_out")},
        "teacher": {"path": "t"},
        "student": {"path": "s"},
    }
    values |= {step: {"steps": 3, "batch_size": 4} for step in ("verbalize", "interact", "reinforce")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
