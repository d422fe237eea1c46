"""Two runs never write one output folder at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faulty_input import REPOSITORY, command, content_of, shard

from data_prep import lock
from data_prep.lock import LOCK, lock_file, lock_folder
from data_prep.schema import DataError

HOLD = """
import sys, time
from pathlib import Path
from data_prep.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""
PUZZLES = ("--source", "puzzles", "--count", 20, "--held-out-count", 4)


@pytest.fixture
def holder(tmp_path: Path):
    run = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert run.stdout is not None and run.stdout.readline() == b"held\n"
    yield run
    run.kill()
    run.wait()
    run.stdout.close()


def test_the_second_refuses_with_both_processes(
    tmp_path: Path, holder: subprocess.Popen, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(tmp_path)
    assert shard(*PUZZLES, "--output", tmp_path) == 2
    said = capsys.readouterr().err
    assert f"is being written by process {holder.pid} on " in said and f"this is process {os.getpid()} on " in said
    assert "use mpirun -n N" in said and "Traceback" not in said and "dead" not in said
    assert content_of(tmp_path) == before


def test_a_lock_ends_with_its_process(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    assert shard(*PUZZLES, "--output", tmp_path) == 0
    assert not (tmp_path / LOCK).exists()


def test_who_waits_gets_the_lock_of_a_process_that_ends(tmp_path: Path, holder: subprocess.Popen) -> None:
    ending = threading.Timer(0.5, holder.kill)
    ending.start()
    with lock_file(tmp_path / LOCK, "it", "wait", wait_s=20):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    with lock_file(tmp_path / LOCK, "it", "wait"):
        began = time.monotonic()
        with pytest.raises(DataError, match="it is being written"), lock_file(tmp_path / LOCK, "it", "-", wait_s=0.5):
            pass
        assert time.monotonic() - began >= 0.5


def test_a_lock_of_a_dead_host_is_waited_for_and_can_be_removed(
    tmp_path: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NFS keeps it for a lease or longer: runs were refused meanwhile, and no way out was named."""
    path, owner = tmp_path / LOCK, (tmp_path / LOCK).read_text()
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    way_out = f"If that host is dead, remove {path}"
    with monkeypatch.context() as impatient, pytest.raises(DataError) as refused:
        impatient.setattr(lock, "DEAD_HOST_S", 1.0)
        with lock_file(path, "it", "end it"):
            pass
    assert str(refused.value).startswith(f"it is being written by {owner}; this is process {os.getpid()} on elsewhere.")
    assert str(refused.value).endswith(f" Wait for it, or end it. {way_out}")
    assert capsys.readouterr().err == f"note: it: waiting up to 1 s for {owner}. {way_out}\n"
    threading.Timer(0.5, path.unlink).start()
    with lock_file(path, "it", "end it"):
        assert path.read_text() == f"process {os.getpid()} on elsewhere"
    assert capsys.readouterr().err == f"note: it: waiting up to 150 s for {owner}. {way_out}\n"


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        with pytest.raises(DataError, match="is being written"), lock_folder(tmp_path):
            pass
        raise ZeroDivisionError
    with lock_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_processes_that_each_believe_to_be_rank_0_write_one_whole_folder(tmp_path: Path) -> None:
    arguments = command("shard", *PUZZLES, "--output", tmp_path / "out")
    runs = [subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [run.communicate()[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes and set(codes) <= {0, 2}
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "is being written by" in text
    assert shard(*PUZZLES, "--output", tmp_path / "alone") == 0
    assert content_of(tmp_path / "out") == content_of(tmp_path / "alone")
