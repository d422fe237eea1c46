from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from faulty_input import REPOSITORY, shard

HELP = ["--help", "shard --help", "shard --source hf --help", "lint --help", "preview --help"]
CODE = """
import sys
from data_prep.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("arguments", HELP)
def test_help_reads_like_a_manual_and_loads_nothing(arguments: str) -> None:
    program = [sys.executable, "-c", CODE, *arguments.split()]
    run = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said, _, loaded = run.stdout.partition("loaded:")
    assert "usage: python -m data_prep" in said
    heavy = {"torch", "numpy", "datasets", "pyarrow", "PIL", "webdataset", "mpi4py", "rich", "pipeline"}
    assert not heavy & set(loaded.split())


def test_help_names_every_source_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shard("--help")
    said = capsys.readouterr().out
    for words in (
        "--source llava",
        "--source hf",
        "--source easy-vqa",
        "--source puzzles",
        "--images",
        "--columns",
        "--noise",
    ):
        assert words in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "x"], "the following arguments are required: --source"),
        (["--source", "lava", "--output", "x"], "invalid choice: 'lava'"),
        (["--source", "llava", "--output", "x"], "the following arguments are required: --input"),
        (["--source", "puzzles"], "the following arguments are required: --output"),
        (["--source", "puzzles", "--output", "x", "--noise", "40"], "'40'; expected a share from 0 to 1"),
        (["--source", "puzzles", "--output", "x", "--noise", "some"], "'some'; expected a share from 0 to 1"),
        (["--source", "puzzles", "--output", "x", "--count", "-3"], "'-3'; expected a whole number"),
        (
            ["--source", "puzzles", "--output", "x", "--samples-per-shard", "0"],
            "'0'; expected a whole number, 1 or more",
        ),
        (["--source", "puzzles", "--output", "x", "--images", "y"], "unrecognized arguments: --images"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        shard(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_srun_without_mpi_is_refused(tmp_path: Any) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "data_prep", "shard", "--source", "puzzles", "--output", str(tmp_path)],
        env={**os.environ, "SLURM_STEP_NUM_TASKS": "4"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "srun started 4 tasks without MPI" in run.stderr and "mpirun -n N" in run.stderr
