"""A job chooses its kernels once, for all ranks, before a model is loaded."""

import pytest
import tiny
from running import deepspeed, tiny_recipe

from pipeline.runtime.folder import read_kernels

WHY = "torch: the device is no CUDA GPU, but cpu"


@pytest.fixture
def recipe(tiny_models, tmp_path):
    data = tiny.write_data(tmp_path / "data", 8, shards=1)
    return tiny_recipe(tmp_path, tiny_models, "qwen2_vl", data, verbalize={"steps": 1, "batch_size": 4})


def test_the_kernels_are_said_once_and_kept_for_status(recipe, tmp_path):
    said = deepspeed(2, "train.py", "--stage", 1, "--only", "verbalize", "--recipe", recipe)
    assert said.count(f"kernels: {WHY}") == 1 and "warning" not in said
    assert read_kernels(tmp_path / "run") == WHY


def test_kernels_that_cannot_be_used_end_the_job_at_its_start(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("VLSI_KERNELS", "triton")
    said = deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe, check=2)
    assert said.count("error: VLSI_KERNELS=triton in the environment, but the Triton kernel cannot be used: ") == 1
    assert "Traceback" not in said and not (tmp_path / "run" / "verbalize").exists()
