"""SIGTERM and SIGUSR1 on one rank: all ranks keep what is done and say "start me again", and nothing is lost."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import psutil
import pytest
from running import cache_folder, deepspeed, free_port, start_ranks, tiny_recipe
from safetensors.torch import load_file
from tiny import write_data

from pipeline.errors import REQUEUE_EXIT
from pipeline.runtime.checkpoint.files import INDEX
from pipeline.runtime.folder import read_metrics, read_requeue

UPDATES = 16
STARTS_WITHIN_S = 200
"""On a machine that others use as well: beside seven more jobs on two cores it took over 120."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_models) -> Path:
    folder = tmp_path_factory.mktemp("signalled")
    data = write_data(folder / "data", 48, shards=6)
    training = {"steps": UPDATES, "checkpoint_every": 1000}
    return tiny_recipe(
        folder, tiny_models, "qwen2_vl", data, verbalize=training, data={"workers": 1}, cache={"batch_tokens": 64}
    )


def verbalize(recipe: Path) -> list[str]:
    return ["launch/train.py", "--stage", "1", "--only", "verbalize", "--recipe", str(recipe)]


def updates_done(run: Path) -> list[int]:
    return [line["update"] for line in read_metrics(run, "verbalize")]


def signalled(recipe: Path) -> str:
    """What two ranks say whose second one, with its loader processes, gets SIGTERM after two updates."""
    run = recipe.parent / "run"
    with tempfile.TemporaryFile("w+") as output:
        ranks = start_ranks(2, str(free_port()), [*verbalize(recipe), "--set", "report=true"], output)
        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while len(updates_done(run)) < 2:
                assert all(one.poll() is None for one in ranks) and time.monotonic() < deadline
                time.sleep(0.02)
            second = psutil.Process(ranks[1].pid)
            children = second.children()
            assert children, "loader processes, which launchers signal too"
            for one in (*children, second):
                one.terminate()
            codes = [one.wait(timeout=60) for one in ranks]
        finally:
            for one in ranks:
                one.kill()
        output.seek(0)
        said = output.read()
    assert codes == [REQUEUE_EXIT] * 2, said
    return said


def test_a_signal_on_one_rank_checkpoints_on_all(recipe):
    said, run = signalled(recipe), recipe.parent / "run"
    last = updates_done(run)[-1]
    assert last < UPDATES and (run / "verbalize" / "checkpoints" / f"update_{last:09d}" / INDEX).is_file()
    line = (
        f"verbalize: stopped after update {last} of {UPDATES}: rank 1 got SIGTERM; the same command goes on from here"
    )
    assert said.count(line) == said.count("goes on") == 1, said
    assert "Traceback" not in said
    assert read_requeue(run) == line
    assert "begun" in (run / "report.html").read_text(), "what was stopped has its report too"


def test_a_run_that_was_signalled_ends_bitwise_as_another(recipe, tmp_path, survived):
    run = recipe.parent / "run"
    assert 2 <= len(updates_done(run)) < UPDATES, "the test above has left it halfway"
    deepspeed(2, "train.py", *verbalize(recipe)[1:])
    deepspeed(2, "train.py", *verbalize(recipe)[1:], "--set", f"run={tmp_path}")
    for role in ("teacher", "student"):
        ours, theirs = (load_file(one / "verbalize" / f"{role}.safetensors") for one in (run, tmp_path))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    measured = {"time", "tokens_per_s", "update_s", "data_wait", "checkpoint_s", "memory"}
    logged = [[{k: x[k] for k in x.keys() - measured} for x in read_metrics(one)] for one in (run, tmp_path)]
    assert logged[0] == logged[1] and len(logged[0]) == UPDATES, "no gap, no double"
    assert read_requeue(run) is None
    survived(signals=1)


def test_the_cache_step_keeps_whole_shards(recipe, survived):
    run = recipe.parent / "run"
    said = deepspeed(2, "../tests/faults/cache_signalled.py", "--recipe", recipe, check=REQUEUE_EXIT)
    assert said.count("cache: stopped; the shards that are whole stay: rank 1 got SIGUSR1; the same command goes") == 1
    shards = sorted(path.name for path in cache_folder(run).glob("*.tar"))
    assert 0 < len(shards) < 6 and not list(cache_folder(run).glob(".*partial"))
    made = {name: (cache_folder(run) / name).stat().st_mtime_ns for name in shards}
    said = deepspeed(2, "cache.py", "--recipe", recipe)
    assert f"cache: {6 - len(shards)} of 6 shards to make" in said and "cache: complete, 6 shards" in said
    assert made == {name: (cache_folder(run) / name).stat().st_mtime_ns for name in shards}
    survived(signals=1)
