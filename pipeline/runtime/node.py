"""A rank's share of the machine it runs on, and how many loader workers that is good for."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.ranks import gather_lists

MOST_WORKERS = 8
"""More are not chosen unasked: each holds a window of samples in memory. Eight cores encode 40 to 140 samples a second
(57 to 200 ms each), which is more than one device trains on."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's limit, as "MICROSECONDS PERIOD" or "max PERIOD"; cores beyond it are seen, but not to be had."""


@dataclass(frozen=True)
class Machine:
    """What one rank may use of its machine."""

    host: str
    cores: tuple[int, ...]
    """Numbers of the cores that the process may run on."""
    quota: float
    """Cores' worth of time that all processes here may use together."""


@dataclass(frozen=True)
class Share:
    """A rank's part of its machine."""

    cores: float
    """A core that several ranks may run on counts in parts."""
    ranks: int
    """Ranks on this machine."""


def this_machine() -> Machine:
    """As the operating system sees this process. Where it tells no set of cores (macOS), all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = sorted(affinity(0)) if affinity else range(os.cpu_count() or 1)
    return Machine(socket.gethostname(), tuple(cores), _quota(CPU_QUOTA))


def share_of(own: Machine, machines: Sequence[Machine]) -> Share:
    """A rank's share, given the machines of all ranks, its own among them.

    Ranks that are bound to cores of their own (as srun does it) keep them; ranks that may run anywhere share evenly.
    """
    here = [machine for machine in machines if machine.host == own.host]
    users = Counter(core for machine in here for core in machine.cores)
    return Share(min(sum(1 / users[core] for core in own.cores), own.quota / len(here)), len(here))


def rank_share() -> Share:
    """This rank's share. All ranks must call."""
    own = this_machine()
    return share_of(own, gather_lists([own]))


def loader_workers(asked: int | None, share: Share, most: int = MOST_WORKERS) -> int:
    """Loader workers of a rank: those that the recipe asks for, or the share without the core that the rank needs.

    None for a rank with less than two cores: a worker would only take turns with it. most: if the recipe does not ask.
    """
    return asked if asked is not None else max(0, min(most, int(share.cores + 1e-6) - 1))


def _quota(path: Path) -> float:
    try:
        time, period = path.read_text(encoding="ascii").split()
        return float("inf") if time == "max" else int(time) / int(period)
    except (OSError, ValueError):  # no such limit here, or not in this form
        return float("inf")
