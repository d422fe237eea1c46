"""Shard folders behind URLs: an S3 server on this machine, in its good and its bad moments."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import s3fs
from s3 import S3, s3_server

from data_prep import storage
from data_prep.atomic import write_file
from data_prep.schema import ChangedSample, DataError
from data_prep.shards import ShardFolder, describe_shard

SHARD = ["--source", "puzzles", "--count", "24", "--held-out-count", "6", "--samples-per-shard", "8"]

FORKED = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from data_prep.shards import ShardFolder
near, far = map(ShardFolder, sys.argv[1:])
assert far.read(0) == near.read(0)  # a client is there when the workers are forked
with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
    assert list(pool.map(far.read, range(len(near)))) == [near.read(index) for index in range(len(near))]
"""


def data_prep(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("near") / "data"
    data_prep("shard", *SHARD, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def far(server: S3) -> str:
    data_prep("shard", *SHARD, "--output", "s3://bucket/data")
    return "s3://bucket/data"


@pytest.fixture(autouse=True)
def without_faults(server: S3) -> Iterator[None]:
    server.injected.clear()
    yield
    server.fault = lambda environ: None


def sums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of all files but the lock."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        str(file)[len(str(folder)) + 1 :]: hashlib.sha256(storage.read_bytes(file)).hexdigest()
        for file in files
    }  # fmt: skip


def test_a_bucket_gets_the_files_that_a_disk_gets(near: Path, far: str) -> None:
    expected = sums(near)
    assert "train/000002.tar" in expected and sums(storage.location(far)) == expected


def test_shards_that_are_there_stay(far: str) -> None:
    assert "4 of 4 shards were finished by an earlier run and stayed" in data_prep("shard", *SHARD, "--output", far)


def test_lint_reads_a_bucket(far: str) -> None:
    assert "all good" in data_prep("lint", far)


def test_processes_forked_from_a_reader_read_the_same(near: Path, far: str) -> None:
    subprocess.run([sys.executable, "-c", FORKED, near / "train", f"{far}/train"], check=True, timeout=60)


def test_faults_that_pass_change_nothing(server: S3, near: Path, far: str) -> None:
    expected = ShardFolder(near / "train")
    server.every(3, "busy", "cut")
    found = ShardFolder(f"{far}/train")
    assert [found.read(index) for index in range(24)] == [expected.read(index) for index in range(24)]
    assert {"busy", "cut"} <= set(server.injected) and len(server.injected) >= 8


def test_a_flipped_bit_costs_one_sample(server: S3, far: str) -> None:
    found = ShardFolder(f"{far}/train")
    server.fault = lambda environ: "flip" if environ["PATH_INFO"].endswith(".tar") else None
    with pytest.raises(ChangedSample, match=r"s3://bucket/data/train/000000\.tar: cannot read sample"):
        found.read(3)
    server.fault = lambda environ: None
    assert found.read(3).key == found.keys[3]


def test_no_such_folder(server: S3) -> None:
    with pytest.raises(DataError, match=r"no s3://bucket/nowhere/manifest\.json; expected a shard folder"):
        ShardFolder("s3://bucket/nowhere")


def test_a_store_that_does_not_answer_is_named(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(storage, "RETRY_S", 0.5)
        with pytest.raises(DataError, match=r"manifest\.json: the store answers ClientConnector.* after 0 s"):
            ShardFolder(f"http://127.0.0.1:{unused.getsockname()[1]}/data")


def test_who_may_not_read_is_told_at_once(server: S3, far: str) -> None:
    found = ShardFolder(f"{far}/train")
    server.fault = lambda environ: "denied"
    with pytest.raises(
        DataError, match=r"000000\.tar: the store answers PermissionError: .*Access Denied.*credentials"
    ):
        found.read(0)
    assert len(server.injected) == 1


def test_a_file_that_cannot_be_uploaded_is_not_there(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_S", 0.5)
    server.fault = lambda environ: "busy" if environ["REQUEST_METHOD"] == "PUT" else None
    path = storage.location("s3://bucket/new/file")
    with pytest.raises(DataError, match="the store answers OSError.*reduce your request rate.*after 0 s"):
        write_file(path, b"content")
    server.fault = lambda environ: None
    assert not storage.is_file(path) and storage.size_of(path) is None
    write_file(path, b"content")
    assert storage.read_bytes(path) == b"content" and storage.size_of(path) == 7


def test_a_web_server_is_read_by_ranges(server: S3, near: Path, far: str) -> None:
    for name in ("manifest.json", "000000.tar", "000002.tar"):
        s3fs.S3FileSystem().chmod(f"bucket/data/train/{name}", acl="public-read")
    expected, found = ShardFolder(near / "train"), ShardFolder(f"{server.endpoint}/bucket/data/train")
    assert [found.read(index) for index in (20, 3)] == [expected.read(index) for index in (20, 3)]


def test_a_web_server_without_ranges_is_refused(near: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(near))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        folder = ShardFolder(f"http://127.0.0.1:{server.server_port}/train")
        with pytest.raises(DataError, match="read as parts of this file, and its server sends only the whole"):
            folder.read(1)
        server.shutdown()


def test_a_shard_behind_a_url_is_described_as_on_the_disk(near: Path, far: str) -> None:
    name = "train/000001.tar"
    assert describe_shard(storage.location(far) / name) == describe_shard(near / name)


def test_a_url_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(DataError, match=r"s3://bucket/data is a URL; reading it needs .*'.\[remote\]'"):
        ShardFolder("s3://bucket/data")
