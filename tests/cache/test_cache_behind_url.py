"""A teacher cache behind a URL: written by jobs and read by stage 2 as on a disk."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from random_cache import HEAD, LAYERS, fill, identity, teacher_outputs, write_data
from s3 import S3, s3_server

from data_prep import storage
from pipeline.cache.find import folder_for, open_cache
from pipeline.cache.layout import command_to_move_aside, command_to_remove
from pipeline.cache.paths import cache_folders
from pipeline.cache.reader import TeacherCache
from pipeline.cache.writer import CacheFolder
from pipeline.errors import CacheError

ROOT = "s3://bucket/run/cache"
CODECS = {"sampled": {"points": 16}, "topk": {"k": 4}, "hidden": {"dtype": "float32"}}


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def made(root, codec, data):
    """A whole cache under a root, and its folder."""
    of = identity(codec, **CODECS[codec])
    path = folder_for(root, of, data)
    assert fill(CacheFolder(path, of, data), data)
    return path


def sums(folder):
    return {
        file.name: hashlib.sha256(storage.read_bytes(file)).hexdigest() for file in folder.iterdir() if file.is_file()
    }


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_bytes_and_the_same_signal(server, data, tmp_path, codec):
    near = made(tmp_path / "cache", codec, data)
    server.every(5, "busy", "cut")
    far = made(storage.location(f"{ROOT}-{codec}"), codec, data)
    assert far.name == near.name and sums(far) == sums(near)
    caches = [TeacherCache(path, data) for path in (near, far)]
    for index in range(len(data)):
        one, other = (cache.read(index) for cache in caches)
        assert one.key == other.key and np.array_equal(one.tokens, other.tokens)
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    assert server.injected and (
        codec != "hidden" or torch.equal(caches[1].unembedding().weight, HEAD.weight[: HEAD.vocab])
    )


def test_it_is_found_by_what_it_is_made_of(server, data):
    root = storage.location(f"{ROOT}-found")
    made(root, "topk", data)
    of = identity("topk", k=4)
    assert [path.name for path in cache_folders(root)] == [folder_for(root, of, data).name]
    cache = open_cache(root, data, of.fingerprints, of.codec, LAYERS, "R")
    assert np.array_equal(cache.read(2).tokens, teacher_outputs("k002")[0])


def test_a_job_makes_what_is_missing_or_was_changed(server, data):
    root, of = storage.location(f"{ROOT}-missing"), identity("topk", k=4)
    path = made(root, "topk", data)
    names = [shard.name for shard in data.shards]
    whole = storage.read_bytes(path / names[1])
    (path / names[0]).unlink()
    (path / names[1]).write_bytes(whole[:-1] + b"x")
    missing = CacheFolder(path, of, data).missing(verify=True)
    assert missing[names[0]] == "the file is gone" and missing[names[1]].startswith("changed: expected SHA-256")
    with pytest.raises(CacheError, match=r"s3://bucket/run/cache-missing/.* has 2 of 3 shards"):
        TeacherCache(path, data)
    assert fill(CacheFolder(path, of, data), data, missing)
    assert not CacheFolder(path, of, data).missing(verify=True) and storage.read_bytes(path / names[1]) == whole


def test_the_commands_that_messages_advise_work_there(server, data):
    root = storage.location(f"{ROOT}-aside")
    path = made(root, "topk", data)
    run_in_a_shell(command_to_remove([path / "000000.json"]))
    assert "000000.json" not in [file.name for file in storage.listed(path, "*")]
    run_in_a_shell(command_to_move_aside(path))
    assert not cache_folders(root) and [file.parent.name for file in storage.listed(root, "*/cache.json")] == [
        f"{path.name}.old"
    ]


def run_in_a_shell(command: str) -> None:
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
