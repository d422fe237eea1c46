"""Ranks watch one another: in one process over torch's HashStore, then in processes that are stopped and killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from running import free_port

from pipeline.runtime import ranks
from pipeline.runtime.faults import watch
from pipeline.runtime.faults.watch import LONG, Failure, Watch

ROOT = Path(__file__).resolve().parents[2]
BEAT_S, HANG_S = 0.02, 0.3
ENDS_WITHIN_S = 30


class Group:
    """Watches of some ranks over one store, and how they end."""

    def __init__(self, world: int, hang_s: float = HANG_S):
        store = dist.HashStore()
        self.ends: dict[int, tuple[Failure, bool]] = {}
        self.watches = [Watch(store, r, world, hang_s, BEAT_S, self._end(r)) for r in range(world)]

    def _end(self, rank: int):
        return lambda failure, is_first: self.ends.update({rank: (failure, is_first)})

    def start(self) -> None:
        for one in self.watches:
            one.start()

    def wait(self, ranks: int) -> None:
        deadline = time.monotonic() + ENDS_WITHIN_S
        while len(self.ends) < ranks and time.monotonic() < deadline:
            time.sleep(BEAT_S)


def test_the_main_thread_that_stands_still_is_blamed_not_those_that_wait_for_it():
    group = Group(4)
    for one in group.watches:
        one.doing("interact: update 7 of 9, loading its micro-batches")
    for rank in (0, 1, 3):
        group.watches[rank].doing("interact: update 7 of 9, counting with all ranks")
    group.start()
    group.wait(4)
    assert len(group.ends) == 4, "all of them end"
    ((failure, _),) = [end for end in group.ends.values() if end[1]]
    assert {end[0] for end in group.ends.values()} == {failure} and failure.code == 1
    assert failure.text.startswith("no progress for 0 s: rank 2 on ") and "rank 0" not in failure.text
    assert "loading its micro-batches'. Of the other ranks 3 wait at 'interact: update 7 of 9, counting" in failure.text
    assert "hang_minutes higher than 0.005" in failure.text


def test_a_rank_that_does_not_beat_is_blamed_whatever_it_did_last():
    group = Group(3)
    group.start()
    time.sleep(5 * BEAT_S)
    group.watches[1]._closed.set()  # its process is stopped: neither thread runs
    for one in group.watches:
        one.doing("reinforce: update 1 of 2, optimizer step")
    group.wait(2)
    ((failure, _),) = [end for end in group.ends.values() if end[1]]
    assert (
        "rank 1 on " in failure.text and "does not answer: it is stopped, or its host is gone. Of the" in failure.text
    )


def test_a_rank_that_loses_its_connection_can_name_the_one_that_fell_silent(monkeypatch):
    group = Group(3, hang_s=60)
    group.start()
    monkeypatch.setattr(watch, "_watch", group.watches[0])
    time.sleep(5 * BEAT_S)
    group.watches[1]._closed.set()  # killed
    group.watches[2].close()  # at its end
    time.sleep(2 * BEAT_S)
    once = watch.beats()
    assert [beat.rank for beat in once] == [0, 1, 2]
    time.sleep(5 * BEAT_S)
    assert watch.silent_since(once).startswith("rank 1 on ") and "rank 2" not in watch.silent_since(once)


def test_progress_long_work_and_an_orderly_end_are_no_hang():
    group = Group(2)
    group.watches[0].doing("verbalize: hashing", long=True)
    group.start()
    for _ in range(12):
        time.sleep(HANG_S / 4)
        group.watches[1].doing("verbalize: loading")
    for one in group.watches:
        one.close()
    assert not group.ends


def test_a_rank_that_makes_something_for_too_long_is_blamed_though_all_ranks_meet_meanwhile(monkeypatch):
    group = Group(2, hang_s=HANG_S / LONG)
    monkeypatch.setattr(watch, "_watch", group.watches[0])
    monkeypatch.setattr(ranks, "HEARTBEAT_S", BEAT_S)
    for what in ("cache: hashing", "cache: hashing: done here, waiting for the other ranks"):
        group.watches[1].doing(what, long=True)
    group.start()
    ranks.gather_when_ready(ranks.Ranks(), "cache: hashing", lambda: group.wait(2) or [])
    assert len(group.ends) == 2, "both end"
    ((failure, _),) = [end for end in group.ends.values() if end[1]]
    assert failure.text.startswith("no progress for 0 s: rank 0 on ") and "rank 1" not in failure.text
    assert "at 'cache: hashing'. Of the other ranks 1 wait at 'cache: hashing: done here, waiting" in failure.text


def test_the_first_failure_is_the_one_that_all_ranks_end_with():
    group = Group(3, hang_s=60)
    assert group.watches[2].fail("rank 2 on host: error: no cache", 2)
    assert not group.watches[0].fail("lost its connection", 1)
    group.start()
    group.wait(2)
    assert group.ends == {rank: (Failure("rank 2 on host: error: no cache", 2), False) for rank in (0, 1)}


RANK = """
import os, sys, threading
import torch.distributed as dist
from pipeline.runtime.faults import watch
rank, port, fails = map(int, sys.argv[1:])
os.environ["RANK"] = str(rank)
watch.BEAT_S = 0.2
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
watch.start(rank, 3, 3 / 60)
watch.doing("interact: update 2 of 3")
dist.barrier()
print("up", flush=True)
if rank == fails:
    watch.failed(f"rank {rank}: error: no room", 2)
    print(f"rank {rank}: error: no room", file=sys.stderr, flush=True)
    threading.Event().wait(15 * watch.BEAT_S)  # as first_error.report lingers: longer than the others take
    os._exit(2)
threading.Event().wait(90)
"""


@contextmanager
def three_ranks(fails: int = -1):
    """Three processes that have met, of which one fails."""
    command = [sys.executable, "-c", RANK]
    port = free_port()
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(port), str(fails)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(3)
    ]
    try:
        assert [one.stdout.readline() for one in ranks] == ["up\n"] * 3  # type: ignore[union-attr]
        yield ranks
    finally:
        for one in ranks:
            one.kill()
            one.communicate()


@pytest.mark.parametrize(
    ("rank", "number", "said"),
    [
        (1, signal.SIGSTOP, "rank 1 on "),
        (0, signal.SIGSTOP, "rank 0, at which the ranks meet, has not answered for "),
        (2, signal.SIGKILL, "its process is gone, killed from outside"),
        (0, signal.SIGKILL, "rank 0, at which the ranks meet, is gone"),
    ],
)
def test_processes_end_when_one_is_stopped_or_killed(rank, number, said):
    with three_ranks() as ranks:
        time.sleep(1)
        ranks[rank].send_signal(number)
        others = [one for one in ranks if one is not ranks[rank]]
        codes = [one.wait(ENDS_WITHIN_S) for one in others]
        errors = "".join(one.stderr.read() for one in others)  # type: ignore[union-attr]
    assert codes == [1, 1]
    assert said in errors, errors


@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_rank_0_hides_no_error_that_came_before_it(rank):
    """Rank 0 holds the store: it ends after the others have read of the failure, and before who failed does."""
    with three_ranks(fails=rank) as ranks:
        codes = [one.wait(ENDS_WITHIN_S) for one in ranks]
        errors = [one.stderr.read() for one in ranks]  # type: ignore[union-attr]
    assert codes == [2, 2, 2]
    assert errors == [f"rank {rank}: error: no room\n" if r == rank else "" for r in range(3)]
