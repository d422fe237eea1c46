"""Work over processes: its order, its errors, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import write_vlm

from pipeline.errors import RecipeError, SampleError
from pipeline.results import workers
from pipeline.results.workers import Machine, Workers, places

TESTS = Path(__file__).parents[1]
NO_MODEL = (9,)
"""Devices on which Late cannot be made."""
KILLED = """
from test_workers import Late
from pipeline.results.workers import Workers
if __name__ == "__main__":
    with Workers(Late, [(), ()]) as pool:
        for pid, _ in pool.map([0.0, 0.0, 100.0, 100.0]):
            print(pid, flush=True)
"""


class Late:
    """Gives an item back after so many seconds, with its process and devices; a text names what goes wrong instead."""

    def __init__(self, devices):
        if devices == NO_MODEL:
            raise RecipeError("no model in nowhere")
        self.devices = devices

    def __call__(self, item: float | str):
        if item == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "memory":
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        if isinstance(item, str):
            raise SampleError(item)
        time.sleep(item)
        return os.getpid(), (self.devices, item)


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    with Workers(Late, [(3,), (4, 5)]) as pool:
        yield pool


@pytest.fixture(scope="module")
def one() -> Iterator[Workers]:
    with Workers(Late, [(7,)]) as here:
        yield here


def test_results_come_in_the_order_of_the_items_whoever_is_ready_first(two):
    seconds = [1.0, 0.0, 0.1, 0.0, 0.05, 0.0]
    found = list(two.map(seconds))
    again = list(two.map(seconds[1:3]))
    assert [item for _, (_, item) in found] == seconds
    pids = {pid for pid, _ in found}
    assert {pid for pid, _ in again} <= pids and os.getpid() not in pids
    assert {devices for _, (devices, _) in found} <= {(3,), (4, 5)}


def test_one_group_works_in_this_process(one):
    assert list(one.map([0.0])) == [(os.getpid(), ((7,), 0.0))]


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_calls_error_is_raised_where_its_result_would_be(which, request):
    pool, found = request.getfixturevalue(which), []
    with pytest.raises(SampleError, match="a bad one"):
        found.extend(item for _, (_, item) in pool.map([0.0, "a bad one", 0.0]))
    assert found == [0.0]
    with pytest.raises(RecipeError, match=r"give a smaller --batch-size. .*20.00 GiB"):
        list(pool.map(["memory"]))


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do(two):
    with pytest.raises(RecipeError, match=r"ended from outside.*--processes"):
        list(two.map(["killed"]))


@pytest.mark.parametrize("groups", [[NO_MODEL], [NO_MODEL, NO_MODEL]])
def test_an_error_in_loading_is_the_users_to_read(groups):
    with Workers(Late, groups) as pool, pytest.raises(RecipeError, match="no model in nowhere"):
        list(pool.map([0.0]))


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


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([()], "1 process on the CPU"),
        ([(), ()], "2 processes on the CPU"),
        ([(0,)], "1 process with 1 GPU"),
        ([(0, 1, 2, 3), (4, 5, 6, 7)], "2 processes with 4 GPUs each"),
    ],
)
def test_places_in_words(groups, words):
    assert places(groups) == words


def test_a_machine_without_a_gpu_holds_as_many_copies_as_asked(tmp_path, monkeypatch):
    folder, machine = write_vlm(tmp_path, "qwen2_vl", 2, 16), Machine()
    size = machine.weights(folder)
    assert machine.groups(folder, None) == [()]
    assert machine.groups(folder, 3) == [(), (), ()]
    monkeypatch.setattr(workers, "available_cpu_memory", lambda: 2 * size)
    with pytest.raises(RecipeError, match=r"there is no GPU, and 3 x .* of weights exceed") as refused:
        machine.groups(folder, 3)
    assert str(folder) in str(refused.value)
