"""A request to stop, made of any one rank, which all ranks heed at the same boundary.

SIGTERM (a preemption, a launcher that is ended) and SIGUSR1 (SLURM's warning ahead of a time limit) only leave a note
here. Each rank shows its note in a collective that every update makes anyway (counts.py, ranks.until_all_done), so all
of them see it in the same update, keep what is done, and leave with REQUEUE_EXIT.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from pipeline.errors import REQUEUE_EXIT

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_GONE = 1
"""What a rank is asked by where its launcher is gone; below the numbers of SIGNALS."""
REPEAT_S = 2.0
"""A second SIGTERM ends the process at once, unless it comes within so many seconds of the first: a launcher and a
batch system may each pass on the same one."""


class Requeue(Exception):
    """Ranks were asked to stop and have kept what is done: the same command goes on. Raised on all ranks alike."""

    def __init__(self, where: str, asked: Sequence[int]):
        """where: what stands where, as "interact: stopped after update 7 of 20". asked: of each rank, what asked it."""
        super().__init__(f"{where}: {who_was_asked(asked)}; the same command goes on from here")


class _Note:
    """What this process was asked to stop by: 0 for nothing, LAUNCHER_GONE, or the number of a signal."""

    def __init__(self) -> None:
        self.asked_by = 0
        self.asked = threading.Event()
        self._terminated_at: float | None = None

    def take(self, number: int) -> None:
        """Note a signal. Ends the process at a second SIGTERM."""
        if number not in SIGNALS:
            return
        if number == signal.SIGTERM:
            now = time.monotonic()
            if self._terminated_at is not None and now - self._terminated_at > REPEAT_S:
                os._exit(128 + number)
            self._terminated_at = self._terminated_at or now
        self.ask(number)

    def ask(self, by: int) -> None:
        """Keep what asked first."""
        self.asked_by = self.asked_by or by
        self.asked.set()


_note = _Note()


def listen() -> None:
    """From now on SIGTERM and SIGUSR1 only ask this process to stop. Call it in the main thread.

    A thread reads the signals from a pipe: a Python handler would wait until the main thread's collective ends, and a
    rank whose peers are gone waits long.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_read, args=(read,), daemon=True, name="signals").start()


def ask_to_stop(by: int) -> None:
    """Ask this process to stop, as a signal does."""
    _note.ask(by)


def wait_for_request(seconds: float) -> bool:
    """Wait until something asks this process to stop, so long at most; returns whether it did."""
    return _note.asked.wait(seconds)


def asked_to_stop() -> int:
    """What has asked this process to stop: 0, LAUNCHER_GONE or a signal's number."""
    return _note.asked_by


def who_was_asked(asked: Sequence[int]) -> str:
    """[0, 15] -> "rank 1 got SIGTERM": of the ranks, the first that was asked, and how many others were."""
    rank = next(rank for rank, by in enumerate(asked) if by)
    others = sum(map(bool, asked)) - 1
    also = f", as did {others} other rank{'s' if others > 1 else ''}" if others else ""
    what = "lost its launcher" if asked[rank] == LAUNCHER_GONE else f"got {signal.Signals(asked[rank]).name}"
    return f"rank {rank} {what}{also}"


def exit_at_signals(what: str) -> None:
    """From now on the first SIGTERM or SIGUSR1 ends this program with REQUEUE_EXIT, its contexts closed.

    For programs of one process that go on where they were ended. what: whose work is kept.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        name = signal.Signals(number).name
        print(f"{what}: stopped: got {name}; what is written is kept, and the same command goes on from there",
              file=sys.stderr, flush=True)  # fmt: skip
        raise SystemExit(REQUEUE_EXIT)

    for number in SIGNALS:
        signal.signal(number, leave)


def leave_signals_to_parent() -> None:
    """In a process that loads or computes for its parent: only its parent's SIGTERM ends it.

    Launchers and batch systems signal all of a job's processes.
    """
    signal.set_wakeup_fd(-1)  # a forked process would write into its parent's pipe
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True, name="signals").start()


def _read(pipe: int) -> None:
    while True:
        for number in os.read(pipe, 64):
            _note.take(number)


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
