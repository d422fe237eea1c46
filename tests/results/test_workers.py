"""Work over processes: its order, its errors, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import write_vlm

from pipeline.errors import RecipeError, SampleError
from pipeline.results import workers
from pipeline.results.workers import Machine, Workers

TESTS = Path(__file__).parents[1]
KILLED = """
import functools, sys, time
from test_workers import Late
from pipeline.results.workers import Workers
if __name__ == "__main__":
    with Workers(Late, [(), ()]) as pool:
        for pid, _ in pool.map([0.0, 0.0, 100.0, 100.0]):
            print(pid, flush=True)
"""


class Late:
    """Gives an item back after so many seconds, and says which process and devices it worked with."""

    def __init__(self, devices):
        self.devices = devices

    def __call__(self, seconds: float):
        time.sleep(seconds)
        return os.getpid(), (self.devices, seconds)


class Failing:
    def __init__(self, devices):
        if devices == (9,):
            raise RecipeError("no model in nowhere")

    def __call__(self, item: str):
        if item == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "memory":
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        raise SampleError(item)


def test_results_come_in_the_order_of_the_items_whoever_is_ready_first():
    seconds = [1.0, 0.0, 0.1, 0.0, 0.05, 0.0]
    with Workers(Late, [(3,), (4, 5)]) as pool:
        found = list(pool.map(seconds))
        again = list(pool.map(seconds[:2]))
    assert [item for _, (_, item) in found] == seconds
    pids, devices = {pid for pid, _ in found}, {one for _, (one, _) in found}
    assert devices == {(3,), (4, 5)} and len(pids) == 2 and os.getpid() not in pids
    assert {pid for pid, _ in again} <= pids


def test_one_group_works_in_this_process():
    with Workers(Late, [(7,)]) as pool:
        assert list(pool.map([0.0])) == [(os.getpid(), ((7,), 0.0))]


@pytest.mark.parametrize("groups", [[(0,)], [(0,), (1,)]])
def test_a_calls_error_is_raised_where_its_result_would_be(groups):
    with Workers(Failing, groups) as pool:
        with pytest.raises(SampleError, match="a bad one"):
            list(pool.map(["a bad one", "another"]))
        with pytest.raises(RecipeError, match=r"give a smaller --batch-size. .*20.00 GiB"):
            list(pool.map(["memory"]))
        if len(groups) > 1:
            with pytest.raises(RecipeError, match=r"ended from outside.*--processes"):
                list(pool.map(["killed"]))


@pytest.mark.parametrize("groups", [[(9,)], [(9,), (9,)]])
def test_an_error_in_loading_is_the_users_to_read(groups):
    with Workers(Failing, groups) as pool, pytest.raises(RecipeError, match="no model in nowhere"):
        list(pool.map(["x", "y"]))


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """Else they would wait for work, and hold their GPUs, for ever."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    pids = {int(parent.stdout.readline()) for _ in range(2)}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_machine_without_a_gpu_holds_as_many_copies_as_asked(tmp_path, monkeypatch):
    folder, machine = write_vlm(tmp_path, "qwen2_vl", 2, 16), Machine()
    size = machine.weights(folder)
    assert machine.groups(folder, None) == [()]
    assert machine.groups(folder, 3) == [(), (), ()]
    monkeypatch.setattr(workers, "available_cpu_memory", lambda: 2 * size)
    with pytest.raises(RecipeError, match=r"there is no GPU, and 3 x .* of weights exceed") as refused:
        machine.groups(folder, 3)
    assert str(folder) in str(refused.value)
