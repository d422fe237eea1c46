"""SIGTERM and SIGUSR1 end a run in good order: finished shards stay, and the same command goes on."""

from __future__ import annotations

import signal
from types import FrameType

REQUEUE_EXIT = 75
"""Exit code after such a signal: start it again. It is pipeline.errors.REQUEUE_EXIT, which nothing here may import."""


class Stopped(BaseException):
    """Raised where the main thread is when a signal comes. No handler of errors takes it for one."""


def raise_at_signals() -> None:
    """From now on the first SIGTERM or SIGUSR1 raises Stopped in the main thread; a second SIGTERM ends at once."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _raise)


def _raise(number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)
