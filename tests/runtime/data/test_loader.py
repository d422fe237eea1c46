"""A loader that cannot go on says so: too little shared memory, a worker that hangs or dies."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.errors import DataError
from pipeline.runtime.data import loader
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.faults import watch
from pipeline.runtime.faults.watch import Watch
from pipeline.vlm.processing import ChatEncoder, load_processor

Usage = namedtuple("Usage", "total used free")
INDICES = [[SampleIndex(0), SampleIndex(1)], [SampleIndex(2), SampleIndex(3)]]


@pytest.fixture
def dataset(tmp_path, tiny_models) -> ChatDataset:
    folder = ShardFolder(write_data(tmp_path / "data", 4))
    return ChatDataset(folder, {"student": ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), 512)})


@pytest.mark.parametrize("by_length", [False, True])
def test_a_batch_that_does_not_fit_into_shared_memory_is_named_and_not_lost(dataset, monkeypatch, by_length):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64_000_000, 63_999_000, 1000))
    batches = (
        loader.load_by_length(dataset, INDICES, 512, 1, "cpu") if by_length else loader.load(dataset, INDICES, 1, "cpu")
    )
    with pytest.raises(DataError) as raised:
        next(batches)
    assert "does not fit into shared memory: /dev/shm has 1.0 KB free of 64.0 MB. Enlarge it" in str(raised.value)
    assert "set data.workers lower: it is 1, and 0 needs none" in str(raised.value)
    assert len(list(loader.load(dataset, INDICES, 0, "cpu"))) == 2, "without workers nothing is shared"


class Hangs(ChatDataset):
    def _read(self, index):
        time.sleep(60)


class Dies(ChatDataset):
    def _read(self, index):
        os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.parametrize("kind", [Hangs, Dies])
def test_a_worker_that_hangs_or_dies_is_named(dataset, monkeypatch, kind):
    monkeypatch.setattr(loader, "STALLED_S", 2)
    stuck = kind(dataset.folder, dataset.encoders)
    with pytest.raises(DataError, match=r"stuck or lost a worker process \(DataLoader .*data.workers lower: it is 1"):
        next(loader.load(stuck, INDICES, 1, "cpu"))


def test_an_error_of_our_own_is_not_taken_for_the_loaders(dataset):
    class Wrong(ChatDataset):
        def _read(self, index):
            raise RuntimeError("of our own")

    with pytest.raises(RuntimeError, match="of our own"):
        next(loader.load(Wrong(dataset.folder, dataset.encoders), INDICES, 0, "cpu"))


def test_workers_may_be_started_without_a_fork(dataset, monkeypatch):
    """Python 3.14 starts processes by forkserver unless told otherwise: everything that a worker needs is pickled."""
    here = [one.batches["student"].inputs["input_ids"] for one in loader.load(dataset, INDICES, 0, "cpu")]
    monkeypatch.setattr(
        loader, "DataLoader", functools.partial(loader.DataLoader, multiprocessing_context="forkserver")
    )
    there = [one.batches["student"].inputs["input_ids"] for one in loader.load(dataset, INDICES, 1, "cpu")]
    assert len(there) == 2 and all(map(torch.equal, here, there))


def test_a_watched_rank_is_found_to_hang_before_its_loader_gives_up(dataset, monkeypatch):
    """It gave up after five minutes whatever hang_minutes was, with the exit code of what the user has to put right."""
    given = []
    monkeypatch.setattr(loader, "DataLoader", lambda *_, timeout, **more: given.append(timeout) or iter(()))
    for watched in (None, Watch(dist.HashStore(), 0, 1, 60 * 20, 2.0, print)):
        monkeypatch.setattr(watch, "_watch", watched)
        for workers in (0, 1):
            assert list(loader.load(dataset, INDICES, workers, "cpu")) == []
    assert given == [0, 300, 0, 60 * (10 * 20 + 5)]


IN_A_CONTAINER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from data_prep.shards import ShardFolder
from pipeline.runtime.data import loader
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.vlm.processing import ChatEncoder, load_processor
encoder = ChatEncoder(load_processor({model!r}), 512)
dataset = ChatDataset(ShardFolder({data!r}), {{"student": encoder}})
loader.STALLED_S = 20
try:
    print(len(list(loader.load(dataset, [[SampleIndex(i) for i in range(4)]] * 3, 2, "cpu"))), "loaded")
except loader.DataError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("size", "expected"),
    [("4k", "no loader worker could be started"), ("64k", "does not fit into shared memory"), ("64m", "3 loaded")],
)
def test_with_a_real_dev_shm_of_that_size(dataset, tiny_models, size, expected):
    """In a mount namespace of its own, as containers have."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root and unshare")
    root = Path(__file__).parents[3]
    folders = {"tests": root / "tests", "root": root, "data": dataset.folder.path}
    folders["model"] = tiny_models["qwen2_vl", "student"]
    program = IN_A_CONTAINER.format(**{name: str(folder) for name, folder in folders.items()})
    command = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, sys.executable, program],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert expected in done.stdout and (size == "64m") != ("data.workers lower: it is 2" in done.stdout), (
        done.stdout + done.stderr
    )
