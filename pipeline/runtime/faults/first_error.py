"""The error of a failing run that its user reads first: that of the rank that failed first, with rank and host.

A failing rank ends all others (watch.py). What they meet then, a lost connection, hides nothing: they do not print it.
"""

from __future__ import annotations

import socket
import sys
import time
import traceback

from pipeline.runtime.faults import stop

ALIKE_S = 1.0
"""How long a rank other than 0 waits before it reports: an error of all ranks is then rank 0's."""
UNMET_S = 10.0
"""The same before the ranks have met: rank 0 may still be importing its libraries."""
CAUSE_S = 30.0
"""How long a rank waits that knows no cause: for the rank that does, or the launcher, to end it."""
LINGER_S = 5.0
"""How long the first to fail stays after its error: the others read of it in rank 0's process, or at their next beat,
before NCCL ends them for a connection that is gone."""


def report(text: str, code: int, rank: int, world: int) -> None:
    """Print an error, unless another rank's came first, and tell the other ranks that this one ends, with this code."""
    if rank:
        time.sleep(ALIKE_S)
    where = f"rank {rank} on {socket.gethostname()}: " if world > 1 else ""
    watch = sys.modules.get(
        "pipeline.runtime.faults.watch"
    )  # it imports torch: an error of the recipe does not wait for that
    is_first = watch.failed(f"{where}{text.splitlines()[0]}", code) if watch else None
    may_be_known = is_first is False or (is_first is None and rank)
    # Meanwhile another rank's end is this one's, or the launcher asks it to end.
    if may_be_known and stop.wait_for_request(CAUSE_S if is_first is False else UNMET_S):
        return
    print(f"{where}{text}", file=sys.stderr, flush=True)
    if is_first and world > 1:
        time.sleep(LINGER_S)


def report_failure(error: Exception, code: int, rank: int, world: int) -> None:
    """Report an error with its traceback.

    One that says that another rank's end broke a connection is one line, and only if no other rank reports the cause.
    """
    from pipeline.runtime.faults import watch
    from pipeline.runtime.faults.out_of_memory import is_out_of_memory, what_helps
    from pipeline.runtime.ranks import lost_connection

    if is_out_of_memory(error):  # NCCL's own too, which looks like a lost connection
        text = f"error: {what_helps(error, watch.now())}\n\n{traceback.format_exc()}"
    elif lost_connection(error):
        once = watch.beats() if rank == 0 else []  # each rank that asked for all beats would be many requests
        if stop.wait_for_request(CAUSE_S):
            return
        other = watch.silent_since(once) or "another rank"
        text = f"lost its connection to {other}, which failed before it: {_in_one_line(error)}"
    else:
        text = f"failed: {type(error).__name__}: {error}\n\n{traceback.format_exc()}"
    report(text, code, rank, world)


def _in_one_line(error: Exception) -> str:
    """The first line, and NCCL's reason, which it says last."""
    said, _, reason = str(error).partition("Last error:")
    first = (said.splitlines() or [type(error).__name__])[0]
    return f"{first}; {' '.join(reason.split())}" if reason else first
