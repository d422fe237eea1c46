"""A rank's share of the machine it runs on: cores, how many loader workers they are good for, and memory."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from pipeline.runtime.ranks import gather_lists

MOST_WORKERS = 8
"""More are not chosen unasked: each holds a window of samples in memory. Eight cores encode 40 to 140 samples a second
(57 to 200 ms each), which is more than one device trains on."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's limit, as "MICROSECONDS PERIOD" or "max PERIOD"; cores beyond it are seen, but not to be had."""
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
"""The control groups of this process: of each hierarchy a line NUMBER:CONTROLLERS:PATH, of version 2 without any."""
GROUP_FILES = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
"""Of version 2 and 1: a group's limit, what it uses, and what its page cache is prefixed with in memory.stat."""


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


def available_memory() -> int:
    """Bytes of memory that may still be taken here: what the node has, and at most what each control group has left.

    A batch system's job is in a group with the memory that it asked for, a container in one with its limit: what takes
    more is killed, though the node has it.
    """
    left = (_left(group, *files) for group in _groups() for files in GROUP_FILES)
    return max(0, min([psutil.virtual_memory().available, *(room for room in left if room is not None)]))


def _groups() -> Iterator[Path]:
    """The groups of this process that may limit its memory, and all above them, as far as they are seen from here."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or "memory" in controllers.split(","):
            own = PurePosixPath(path)
            yield from (GROUPS / controllers / str(group).lstrip("/") for group in (own, *own.parents))


def _left(group: Path, limit: str, used: str, prefix: str) -> int | None:
    """Bytes that a group may still take, its page cache among them, for that makes room; None where it has no limit."""
    try:
        room = int((group / limit).read_text(encoding="ascii")) - int((group / used).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return room + sum(int(stat[f"{prefix}{state}_file"]) for state in ("active", "inactive"))
    except (OSError, ValueError, KeyError):  # no such group or limit here, or not in this form
        return None


def _quota(path: Path) -> float:
    try:
        time, period = path.read_text(encoding="ascii").split()
        return float("inf") if time == "max" else int(time) / int(period)
    except (OSError, ValueError):  # no such limit here, or not in this form
        return float("inf")
