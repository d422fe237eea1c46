"""Random reads of many shards: each is opened once, as long as the process may keep it open."""

from __future__ import annotations

import os
import pickle
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import open_files
from data_prep.open_files import FEWEST, allow_open_files, most_open
from data_prep.shards import FORMAT, ShardFolder, shard_name, write_manifest, write_shard

SHARDS, EACH = 120, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("many")
    entries = [
        write_shard(path / shard_name(shard), [(f"k{shard}-{i}", {"json": b"{}"}) for i in range(EACH)])
        for shard in range(SHARDS)
    ]
    write_manifest(path, entries, format=FORMAT, version=1, split="train")
    return path


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that were opened."""
    names: list[str] = []

    def counting(path, *rest, **options):
        names.append(Path(path).name)
        return open(path, *rest, **options)

    monkeypatch.setattr(open_files, "open", counting, raising=False)
    return names


@pytest.fixture(autouse=True)
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def read_epochs(path: Path, epochs: int) -> ShardFolder:
    data, order = ShardFolder(path), list(range(SHARDS * EACH))
    for epoch in range(epochs):
        random.Random(epoch).shuffle(order)
        for index in order:
            data.read_members(index)
    return data


def test_each_shard_is_opened_once(folder, opened, limits):
    """With 32 kept open, 3 of 4 reads opened one here, and 99 of 100 of 2,900 shards."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limits[1]), limits[1]))
    read_epochs(folder, 3)
    assert sorted(opened) == [shard_name(shard) for shard in range(SHARDS)]


def test_no_more_are_kept_than_the_process_may_open(folder, opened, limits):
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    assert most_open() == 50
    before = len(os.listdir("/proc/self/fd"))
    data = read_epochs(folder, 1)
    assert len(data._files) == 50 and len(os.listdir("/proc/self/fd")) <= before + 50
    opened.clear()
    for index in range(SHARDS * EACH):  # in order: a shard stays open while it is used
        data.read_members(index)
    assert len(opened) <= SHARDS


def test_a_limit_of_a_few_leaves_what_there_was(limits):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    assert most_open() == FEWEST


def test_a_job_asks_for_what_the_system_allows(limits):
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 4096:
        pytest.skip(f"the system allows {limits[1]} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    allow_open_files()
    assert most_open() >= 1024
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    allow_open_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft


def test_a_worker_opens_its_own(folder):
    data = ShardFolder(folder)
    data.read_members(0)
    sent = pickle.loads(pickle.dumps(data))
    assert len(data._files) == 1 and len(sent._files) == 0
    assert sent.read_members(5) == data.read_members(5)
