"""Several jobs that start at once hash a teacher once: one does it, and the others wait for what it found."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time

import pytest

from data_prep.lock import lock_file
from pipeline.cache import hashes
from pipeline.cache.hashes import IN_RUN, HashStore, check_sha256
from pipeline.errors import CacheError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "vlsi" / "sha256.json"


@pytest.fixture
def files(tmp_path):
    made = [tmp_path / f"model-0000{number}-of-00003.safetensors" for number in range(3)]
    for number, file in enumerate(made):
        file.write_bytes(bytes([number]) * 1000)
    return made


@pytest.fixture
def hashed(monkeypatch) -> list:
    """The files that were really read, each as slowly as a large one."""
    read, real = [], hashes.file_sha256

    def slowly(path):
        read.append(path)
        time.sleep(0.2)
        return real(path)

    monkeypatch.setattr(hashes, "file_sha256", slowly)
    return read


def test_the_tasks_of_an_array_hash_each_file_once(tmp_path, files, hashed):
    """Eight jobs at once; all of them hashed all files: 145 GB each for a teacher of 72B."""
    found = []
    jobs = [threading.Thread(target=lambda: found.append(HashStore(tmp_path / "run").digests(files))) for _ in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert sorted(hashed) == files
    expected = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert found == [expected] * 8
    assert [path.name for path in (tmp_path / "run").iterdir()] == [IN_RUN], "no lock is left"


def test_what_a_run_has_hashed_is_known_on_a_machine_with_another_home(tmp_path, files, hashed, monkeypatch):
    HashStore(tmp_path / "run").digests(files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another home"))
    HashStore(tmp_path / "run").digests(files)
    assert len(hashed) == 3


def test_another_run_of_the_user_knows_them_too(tmp_path, files, hashed, home):
    HashStore(tmp_path / "run").digests(files)
    HashStore(tmp_path / "other").digests(files)
    HashStore().digests(files)
    assert len(hashed) == 3 and len(json.loads(home.read_text())) == 3


def test_a_flipped_bit_that_leaves_size_and_time_is_found(files):
    """As a disk does it: what is remembered by size and time would not notice."""
    good, times = hashlib.sha256(files[1].read_bytes()).hexdigest(), files[1].stat()
    check_sha256(files[1], good, "Make it again.")
    check_sha256(files[1], None, "of a run from before hashes were kept")
    files[1].write_bytes(b"\x03" + files[1].read_bytes()[1:])
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        CacheError, match=f"00003.safetensors is damaged: expected SHA-256 {good}, found .*Make it again."
    ):
        check_sha256(files[1], good, "Make it again.")
    files[1].unlink()
    with pytest.raises(CacheError, match=r"00003.safetensors is gone. Make it again."):
        check_sha256(files[1], good, "Make it again.")


@pytest.fixture
def lock(tmp_path, files, home, monkeypatch):
    """What a job holds that hashes these files, which no job has hashed yet."""
    locked, real = [], hashes.lock_file
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "lock_file", lambda path, *rest: locked.append(path) or real(path, *rest))
        HashStore(tmp_path / "run").digests(files)
    (tmp_path / "run" / IN_RUN).unlink()
    home.unlink()
    return locked[0]


def test_a_job_that_waits_in_vain_hashes_itself(tmp_path, files, lock, hashed, monkeypatch):
    """A stopped process may hold the lock for ever: it is there to save work, not to guard anything."""
    monkeypatch.setattr(hashes, "WAIT_S", 0.3)
    with lock_file(lock, "it", "-"):
        HashStore(tmp_path / "run").digests(files)
    assert len(hashed) == 3


def test_a_job_that_waits_for_a_dead_host_says_what_to_remove(tmp_path, files, lock, hashed, monkeypatch, capsys):
    monkeypatch.setattr(hashes, "WAIT_S", 500.0)
    with lock_file(lock, "it", "-"):
        owner = lock.read_text()
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        threading.Timer(0.5, lock.unlink).start()
        HashStore(tmp_path / "run").digests(files)
    said = f"note: hashes of files: waiting up to 500 s for {owner}. If that host is dead, remove {lock}\n"
    assert capsys.readouterr().err == said and len(hashed) == 3
