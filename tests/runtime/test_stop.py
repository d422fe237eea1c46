"""What a signal does to a process, and what all ranks make of it."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.runtime import ranks
from pipeline.runtime.counts import count_update
from pipeline.runtime.faults import stop
from pipeline.runtime.ranks import Ranks, heed_stop, until_all_done

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import threading
from pipeline.runtime.faults import stop
stop.REPEAT_S = {repeat}
stop.listen()
print("up", flush=True)
threading.Event().wait(60)  # as in a collective: no Python code of this thread runs
"""
LOADER = """
import multiprocessing, os, signal, time
from pipeline.runtime.faults import stop
def load():
    stop.leave_signals_to_parent()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.2)
    print("still loading", flush=True)
    time.sleep(60)
stop.listen()
child = multiprocessing.get_context("fork").Process(target=load)
child.start()
time.sleep(0.6)
child.terminate()
child.join(20)
print(child.exitcode, stop.asked_to_stop())
"""


def start(program: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("repeat", "ends"), [(0.0, True), (60.0, False)])
def test_a_second_sigterm_ends_at_once_but_not_the_echo_of_the_first(repeat, ends):
    with start(RANK.format(repeat=repeat)) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "up\n"
        for number in (signal.SIGUSR1, signal.SIGTERM):
            rank.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(0.3)
        rank.send_signal(signal.SIGTERM)
        if ends:
            assert rank.wait(20) == 128 + signal.SIGTERM
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(0.3)
            rank.kill()


def test_only_its_parent_ends_a_loader_process():
    with start(LOADER) as parent:
        assert parent.communicate(timeout=30)[0].split("\n")[:2] == ["still loading", "0 0"]


def test_who_was_asked_is_said_briefly():
    assert stop.who_was_asked([0, signal.SIGTERM, 0]) == "rank 1 got SIGTERM"
    assert stop.who_was_asked([signal.SIGUSR1] * 2) == "rank 0 got SIGUSR1, as did 1 other rank"
    assert stop.who_was_asked([0, stop.LAUNCHER_GONE, 15, 15]) == "rank 1 lost its launcher, as did 2 other ranks"


def test_a_request_is_heeded_where_ranks_meet(monkeypatch):
    asked = []
    monkeypatch.setattr(ranks, "asked_to_stop", lambda: asked[-1] if asked else 0)
    taken = []
    with pytest.raises(stop.Requeue, match="cache: stopped: rank 0 got SIGTERM; the same command goes on from here"):
        for item in until_all_done(iter("abcd"), Ranks(), "cache: stopped"):
            taken.append(item)
            if item == "b":
                asked.append(int(signal.SIGTERM))
    assert taken == ["a", "b"]
    with pytest.raises(stop.Requeue, match="interact: not begun: rank 0 got SIGTERM"):
        heed_stop("interact: not begun")
    asked.clear()
    assert list(until_all_done(iter("ab"), Ranks(), "-")) == ["a", "b"]


def test_the_counts_of_an_update_carry_the_request(monkeypatch):
    monkeypatch.setattr("pipeline.runtime.counts.asked_to_stop", lambda: int(signal.SIGUSR1))
    ours = SimpleNamespace(
        tokens=lambda: 3, images=lambda: 1, rejected=[], real_tokens=lambda: 5, computed_tokens=lambda: 7
    )
    counts = count_update([ours, ours], Ranks(0, 3), torch.device("cpu"))
    assert counts.asked == (signal.SIGUSR1, 0, 0)
    assert (counts.tokens, counts.images, counts.real, counts.computed) == (6, 2, 10, 2 * 7 * 3)
