"""The launcher is killed: its ranks end, the same command goes on, and no second job joins a living one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from running import ROOT, deepspeed, free_port, tiny_recipe
from safetensors.torch import load_file
from tiny import write_data

from data_prep.lock import lock_file
from pipeline.runtime.checkpoint.files import INDEX
from pipeline.runtime.folder import read_metrics, read_requeue

STARTS_WITHIN_S = 200
ENDS_WITHIN_S = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_models) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    data = write_data(folder / "data", 24, shards=1)
    training = {"steps": 24, "checkpoint_every": 2}
    return tiny_recipe(folder, tiny_models, "qwen2_vl", data, verbalize=training)


def start(recipe: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """The real launcher with two ranks; returns it and all that it started, once there are some updates more."""
    program = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_accelerators", "2"]
    step = ["launch/train.py", "--stage", "1", "--only", "verbalize", "--recipe", str(recipe)]
    before = len(read_metrics(recipe.parent / "run"))
    started = psutil.Popen(
        [*program, "--master_port", str(free_port()), *step],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + STARTS_WITHIN_S
    while len(read_metrics(recipe.parent / "run")) < before + 3:
        assert started.poll() is None and time.monotonic() < deadline, "it ended, or made no update"
        time.sleep(0.05)
    return started, started.children(recursive=True)


@pytest.mark.parametrize("place", ["the launcher that was started", "the launcher of the node"])
def test_no_rank_is_left_behind(recipe, place, survived):
    launcher, started = start(recipe)
    ranks = [one for one in started if "launch/train.py" in one.cmdline()[2:3]]
    node = next(one for one in started if "deepspeed.launcher.launch" in one.cmdline())
    assert len(ranks) == 2, [one.cmdline() for one in started]
    (launcher if place.endswith("started") else node).kill()
    _, alive = psutil.wait_procs([launcher, *started], timeout=ENDS_WITHIN_S)
    for one in alive:
        one.kill()
    assert not [one for one in ranks if one in alive]
    run = recipe.parent / "run"
    last = read_metrics(run)[-1]["update"]
    assert (run / "verbalize" / "checkpoints" / f"update_{last:09d}" / INDEX).is_file(), "no update is lost"
    assert "lost its launcher" in (read_requeue(run) or "")
    survived(kills=1)


def test_a_run_whose_launchers_were_killed_ends_bitwise_as_another(recipe, tmp_path):
    assert 6 <= len(read_metrics(recipe.parent / "run")) < 24, "the tests above have left it halfway"
    deepspeed(2, "train.py", "--stage", 1, "--only", "verbalize", "--recipe", recipe)
    other = ["--set", f"run={tmp_path / 'never killed'}"]
    deepspeed(2, "train.py", "--stage", 1, "--only", "verbalize", "--recipe", recipe, *other)
    for role in ("teacher", "student"):
        ours, theirs = (
            load_file(run / "verbalize" / f"{role}.safetensors")
            for run in (recipe.parent / "run", tmp_path / "never killed")
        )
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    updates = [line["update"] for line in read_metrics(recipe.parent / "run")]
    assert sorted(set(updates)) == list(range(1, 25))


def test_a_second_job_on_the_same_step_refuses(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with lock_file(run / ".verbalize.lock", "it", "-"):
        said = deepspeed(
            1, "train.py", "--stage", 1, "--only", "verbalize", "--recipe", recipe, "--set", f"run={run}", check=2
        )
    assert f"error: verbalize of {run} is being written by process " in said and "--set run=FOLDER" in said
    assert not (run / "verbalize").exists()
