"""What ranks find out together: who is there, whether they share a folder, how fast they sum."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from data_prep.atomic import write_file
from data_prep.schema import DataError
from data_prep.storage import is_file, is_url, remove
from pipeline.results.preflight.judge import Finding
from pipeline.runtime.display.progress import size_text
from pipeline.runtime.ranks import Ranks, gather_lists, of_first_rank, sum_over_ranks, wait_for_all

JOIN_S = 590.0
"""How long ranks may take to start and to meet, for disks are cold and images are still pulled: as long as a training
waits for them. DeepSpeed gives up after 10 minutes and does not say who is missing."""
LIMIT_S = 55.0
"""How long all else may take, once all ranks are there."""
SEEN_S = 10.0
"""How long a file that one rank wrote may take to be seen by another: file systems cache what a folder holds."""
ELEMENTS = 8 * 2**20
"""Of the float32 tensor that is summed: 32 MiB."""
TIMES = 3


class Deadline:
    """Ends this process with what it stood at, and exit code `code`, if it has not been called off by then."""

    def __init__(self, code: int, at: str = "starting", limit_s: float = JOIN_S):
        self._code = code
        self._start(at, limit_s)

    def begin(self, at: str, limit_s: float) -> None:
        """Count anew: this, and all that `at` is set to after it, may take so long."""
        self.call_off()
        self._start(at, limit_s)

    def _start(self, at: str, limit_s: float) -> None:
        self.at, self.timer = at, threading.Timer(limit_s, self._end, [limit_s])
        self.timer.daemon = True
        self.timer.start()

    def call_off(self) -> None:
        """All is done."""
        self.timer.cancel()

    def _end(self, limit_s: float) -> None:
        text = _who_is_missing() if self.at == JOINING else "the other ranks, or the disk, do not answer"
        where = f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"
        print(f"WRONG {where}: {self.at} for {limit_s:.0f} s; {text}", file=sys.stderr, flush=True)
        os._exit(self._code)


JOINING = "waiting for the other ranks"


def _who_is_missing() -> str:
    """On the machine that the ranks meet at: which hosts have come. Elsewhere: where this rank tried to go."""
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
    world = os.environ.get("WORLD_SIZE", "?")
    if os.environ.get("RANK", "0") == "0":
        came = Counter(
            line.raddr.ip
            for line in psutil.net_connections("tcp")
            if line.status == psutil.CONN_ESTABLISHED and line.laddr.port == port and line.raddr
        )
        hosts = ", ".join(f"{ip} ({number})" for ip, number in came.items()) or "none"
        return (
            f"{world} ranks are to meet at {address}:{port}; connections are there from {hosts}. Look at the hosts "
            "that are not named: do they resolve this address, and does a firewall let them through?"
        )
    try:
        with socket.create_connection((address, port), timeout=3):
            answer = "it answers, so look at the ranks that do not say this"
    except OSError as error:
        answer = (
            f"it does not answer ({error}): MASTER_ADDR must be a name or address of rank 0 that this host resolves"
        )
    return f"{world} ranks are to meet at {address}:{port}; {answer}"


def share_folder(folder: Path, ranks: Ranks) -> str:
    """Why this rank cannot use a folder with the others; empty where it can. Every rank writes, all are seen.

    folder: on a disk or behind a URL. Leaves nothing behind but the folder. All ranks must call.
    """
    token = of_first_rank(secrets.token_hex(4))
    own = folder / f".preflight-{token}-{ranks.rank}"
    problem = ""
    try:
        if not is_url(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_file(own, b"seen")
    except DataError as error:  # it names the URL
        problem = str(error)
    except OSError as error:
        problem = f"{folder} cannot be written ({error.strerror})"
    wrote = [rank for rank, why in enumerate(gather_lists([problem])) if not why]
    unseen = _unseen([folder / f".preflight-{token}-{rank}" for rank in wrote])
    wait_for_all()
    if not problem:
        with contextlib.suppress(OSError, DataError):  # it may be written and not removed; it is named a preflight's
            remove(own)
    if not problem and unseen:
        problem = f"{folder} does not show what rank {unseen[0].name.rpartition('-')[2]} wrote into it"
    return problem


def _unseen(files: list[Path]) -> list[Path]:
    end = time.monotonic() + SEEN_S
    while unseen := [file for file in files if not _is_seen(file)]:
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return unseen


def _is_seen(file: Path) -> bool:
    try:
        return is_file(file)
    except DataError:  # a store that does not let it be read does not show it
        return False


def sum_together(ranks: Ranks) -> Finding:
    """A sum over all ranks: right, and how fast. Bytes a second that each rank sends and receives in a ring."""
    if ranks.world == 1:
        return Finding("all-reduce", True, "one rank, nothing to sum")
    values = torch.empty(ELEMENTS, device=ranks.device)
    took = []
    for _ in range(TIMES + 1):  # the first one also makes the connections
        values.fill_(ranks.rank + 1)
        wait_for_all()
        begun = time.monotonic()
        sum_over_ranks(values)
        total = float(values[-1])  # waits for the device
        took.append(time.monotonic() - begun)
    expected = ranks.world * (ranks.world + 1) / 2
    right = all(gather_lists([bool((values == expected).all())]))
    speed = 2 * (ranks.world - 1) / ranks.world * values.nbytes / max(gather_lists([min(took[1:])]))
    text = f"{size_text(values.nbytes)} over {ranks.world} ranks by {dist.get_backend()}, {speed / 1e9:.2f} GB/s a rank"
    if right:
        return Finding("all-reduce", True, text)
    return Finding(
        "all-reduce", False, f"{text}: expected {expected:g}, found {total:g}", "test the network's adapters"
    )
