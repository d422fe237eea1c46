"""Ranks watch one another: one that stands still or is gone is named, and an error of one ends all of them.

Beside its work each rank has a thread that posts a beat to the process group's store every BEAT_S: what its main
thread is doing (`doing`), and how often that has changed. Rank r reads the beat of rank r + 1, so whichever ranks stand
still, one of them has a healthy reader. Whoever finds something posts it; every rank reads that at its next beat and
ends. So ranks also end where no launcher watches them all (pdsh: each node's launcher watches its own).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch.distributed as dist

from pipeline.runtime.display.progress import show_cursor

BEAT_S = 2.0
LONG = 10
"""By how many times what takes long (hashing, loading, checkpoints) may go beyond hang_minutes."""
SILENT_BEATS = 5
"""A rank that has not posted a beat in the time of so many does not answer."""
SAID_RANKS = 4
FAILED = "failed"
"""The store's key for the first failure."""


@dataclass(frozen=True)
class Failure:
    """Why all ranks end."""

    text: str
    code: int
    """The exit code of all ranks."""


@dataclass(frozen=True)
class Beat:
    """What a rank posts of itself."""

    rank: int
    host: str
    process: int
    born: float
    beats: int
    changes: int
    """How often the main thread has said what it does: it stands still where this does not grow."""
    doing: str
    long: bool
    """Whether what it does may take LONG times as long."""
    closed: bool = False

    def is_gone(self) -> bool:
        """Whether its process, of this host, has ended."""
        try:
            process = psutil.Process(self.process)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.born) > 1
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process}), at {self.doing!r}"


class Watch:
    """One rank's part in it. The time it counts is that of its own beats: a rank that was stopped blames nobody."""

    def __init__(
        self, store: Any, rank: int, world: int, hang_s: float, beat_s: float, end: Callable[[Failure, bool], None]
    ):
        """store: of all ranks, by a connection that nothing else uses: an operation on one waits for the other.

        end: called with the failure that ends all ranks, and whether this rank is the first to say it.
        """
        self._store, self._rank, self._world, self.hang_s = store, rank, world, hang_s
        self._end, self._beat_s = end, beat_s
        own = psutil.Process()
        self._own = Beat(rank, socket.gethostname(), own.pid, own.create_time(), 0, 0, "starting", True)
        self._next: Beat | None = None
        self._once: list[Beat] = []
        self._may_be_looked_up = self._failed = False
        self._still_s = self._unanswered_s = 0.0
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._count_unanswered)]

    def start(self) -> None:
        """Begin to post and to read."""
        for thread in self._threads:
            thread.start()

    def doing(self, what: str, long: bool = False) -> None:
        """Say what the main thread is about to do. long: whether it may take LONG times hang_minutes."""
        self._own = replace(self._own, changes=self._own.changes + 1, doing=what, long=long)

    @property
    def now(self) -> str:
        """What the main thread said last."""
        return self._own.doing

    def fail(self, text: str, code: int) -> bool:
        """Post that this rank failed, which ends all others. Returns whether it is the first."""
        posted = json.dumps({"by": self._rank, **asdict(Failure(text, code))})
        self._failed = self._store.compare_set(FAILED, "", posted).decode() == posted
        return self._failed

    def close(self) -> None:
        """The end: nobody waits for this rank's beats any more."""
        self._closed.set()
        self._threads[0].join()
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._own) | {"closed": True}))

    def _beat(self) -> None:
        beats = 0
        while not self._closed.wait(self._beat_s):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._own) | {"beats": beats}))
                if self._store.check([FAILED]):
                    posted = json.loads(self._store.get(FAILED))
                    if posted["by"] == self._rank:
                        return None  # its main thread is about to end
                    return self._end(Failure(posted["text"], posted["code"]), False)
                self._look_at(self._beat_of((self._rank + 1) % self._world))
            except RuntimeError as error:  # what the store raises, whatever it is
                if self._failed:
                    return None  # rank 0 has read of it and ended; this rank's main thread is about to
                first = str(error).splitlines()[0]
                text = f"rank 0, at which the ranks meet, is gone: its process was killed, or its host is ({first})"
                return self._end(Failure(text, 1), True)
            self._unanswered_s = 0.0

    def _count_unanswered(self) -> None:
        """The store answers from rank 0's process: where it stands still, the thread above waits for ever."""
        while not self._closed.wait(self._beat_s):
            self._unanswered_s += self._beat_s
            if self._unanswered_s > self._limit(self._own) + SILENT_BEATS * self._beat_s:
                text = f"rank 0, at which the ranks meet, has not answered for {_time(self._unanswered_s)}"
                return self._end(Failure(f"{text}. This is {self._own}. {self._advice()}", 1), True)

    def _look_at(self, beat: Beat | None) -> None:
        if beat is None or beat.closed:
            return
        before, self._next = self._next, beat
        if before is None and beat.host == self._own.host:
            self._may_be_looked_up = not beat.is_gone()  # else it has other process numbers: a container of its own
        if self._may_be_looked_up and beat.is_gone():
            why = "by hand, or for its memory (dmesg says so); or NCCL ended it, see above"
            return self._found(f"{beat}: its process is gone, killed from outside: {why}")
        if before is None or beat.changes != before.changes:
            self._still_s, self._once = 0.0, []
            return
        self._still_s += self._beat_s
        if self._still_s > self._limit(beat) and not self._once:
            self._once = self.all_beats()
        elif self._still_s > self._limit(beat) + SILENT_BEATS * self._beat_s:  # who beats has done so meanwhile
            self._tell_where_all_stand(self._once, self.all_beats())

    def _tell_where_all_stand(self, once: Sequence[Beat], now: Sequence[Beat]) -> None:
        """Blame the ranks that do not beat; if all do, those whose main thread is behind the others'."""
        silent = _silent(once, now)
        least = min(beat.changes for beat in now)
        still = silent or [beat for beat in now if beat.changes == least]
        named = "; ".join(map(str, still[:SAID_RANKS]))
        named += f" and {len(still) - SAID_RANKS} more" if len(still) > SAID_RANKS else ""
        answer = " and does not answer: it is stopped, or its host is gone" if silent else ""
        waiting = _waiting([beat for beat in now if beat not in still])
        self._found(f"no progress for {_time(self._still_s)}: {named}{answer}. {waiting}{self._advice()}")

    def _limit(self, beat: Beat) -> float:
        return self.hang_s * (LONG if beat.long else 1)

    def _advice(self) -> str:
        return (
            "All ranks end; the same command goes on from the last checkpoint. Look at that host: its file systems, "
            f"its GPUs (dmesg, nvidia-smi). If it was only slow, set hang_minutes higher than {self.hang_s / 60:g}"
        )

    def _found(self, text: str) -> None:
        if self.fail(text, 1):
            self._end(Failure(text, 1), True)

    def all_beats(self) -> list[Beat]:
        """The last that each rank has posted. Raises RuntimeError where rank 0 is gone."""
        keys = [f"beat/{rank}" for rank in range(self._world)]
        if self._store.check(keys):  # one request: in a hang all ranks ask at the same time
            return [Beat(**json.loads(posted)) for posted in self._store.multi_get(keys)]
        return [beat for beat in map(self._beat_of, range(self._world)) if beat is not None]

    def _beat_of(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None


def _silent(once: Sequence[Beat], now: Sequence[Beat]) -> list[Beat]:
    """Those that have posted nothing since then."""
    before = {beat.rank: beat.beats for beat in once}
    return [beat for beat in now if before.get(beat.rank) == beat.beats and not beat.closed]


def _waiting(others: Sequence[Beat]) -> str:
    if not others:
        return ""
    ((doing, count),) = Counter(beat.doing for beat in others).most_common(1)
    return f"Of the other ranks {count} wait at {doing!r}. "


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} s"


_watch: Watch | None = None


def limit_minutes(hang_minutes: float) -> float:
    """Minutes after which a collective or a loader may end by itself: later than a hang is found in what takes long."""
    return LONG * hang_minutes + 5


def limit_s() -> float:
    """limit_minutes in this process, in seconds; 0 where nobody watches."""
    return 0.0 if _watch is None else 60 * limit_minutes(_watch.hang_s / 60)


def start(rank: int, world: int, hang_minutes: float) -> None:
    """Watch and be watched from now on. The process group must be there."""
    global _watch
    _watch = Watch(_connect(), rank, world, 60 * hang_minutes, BEAT_S, _end_process)
    _watch.start()


def _connect() -> dist.Store:
    """A connection of this thread's own to the store of the process group: one that is in use makes others wait."""
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    own = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    # torchrun keeps its store when it starts ranks again: what failed before must not end these.
    return dist.PrefixStore(f"vlsi/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", own)


def doing(what: str, long: bool = False) -> None:
    """Say what the main thread is about to do, in a process that is watched. See Watch.doing."""
    if _watch is not None:
        _watch.doing(what, long)


def now() -> str:
    """What the main thread said last that it is about to do."""
    return "the start" if _watch is None else _watch.now


def failed(text: str, code: int) -> bool | None:
    """Tell the other ranks that this one failed. Returns whether it is the first; None where nobody watches."""
    if _watch is None:
        return None
    try:
        return _watch.fail(text, code)
    except RuntimeError:  # rank 0 is gone, and the store with it
        return None


def beats() -> list[Beat]:
    """The last beat of each rank; none where nobody watches, or rank 0 is gone."""
    try:
        return _watch.all_beats() if _watch is not None else []
    except RuntimeError:
        return []


def silent_since(once: Sequence[Beat]) -> str:
    """The ranks that have posted no beat since `once`, named; empty where all have."""
    return "; ".join(map(str, _silent(once, beats())[:SAID_RANKS]))


def stop() -> None:
    """Neither watch nor be watched any more: the work is done."""
    global _watch
    if _watch is not None:
        _watch.close()
    _watch = None


def _end_process(failure: Failure, is_first: bool) -> None:
    """Say what is not said yet, and end. Where rank 0 is gone every rank finds that out: rank 1 says it."""
    rank = int(os.environ.get("RANK", "0"))
    if is_first:
        if rank > 1:
            time.sleep(BEAT_S)
        print(f"error: {failure.text}", file=sys.stderr, flush=True)
    if is_first or rank == 0:
        time.sleep(2 * BEAT_S)  # the store may be this process's: the others have to read it
    show_cursor()
    sys.stdout.flush()
    os._exit(failure.code)
