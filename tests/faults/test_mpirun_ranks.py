"""Under mpirun (deepspeed --launcher openmpi) the number of ranks is known only once they have met."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, free_port, tiny_recipe
from tiny import write_data


def test_a_batch_that_three_ranks_cannot_share_is_refused_by_all_before_a_model_is_loaded(tiny_models, tmp_path):
    """batch_size 8 of micro-batches of 2 fits one rank and two, not three: they trained unequal parts of 6 samples."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun: pip install -e '.[mpi]'")
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", write_data(tmp_path / "data", 16))
    unset = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [program, "-n", "3", "--oversubscribe", sys.executable, "launch/train.py", "--stage", "1", "--recipe", recipe],
        cwd=ROOT,
        env={**unset, "MASTER_PORT": str(free_port()), "OMPI_ALLOW_RUN_AS_ROOT": "1",
             "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "verbalize.batch_size: 8 is no multiple of verbalize.micro_batch_size x ranks = 2 x 3 = 6" in said
    assert said.count("error: 1 problem(s) in the recipe") == 1, "what all ranks found is said once, by rank 0"
    assert "Traceback" not in said and not (tmp_path / "run" / "recipe.yaml").exists()
