"""Facts of all ranks and the recipe's needs -> what is right, what is wrong, and the fix: a line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.results.preflight.facts import Facts
from pipeline.results.preflight.needs import Needs
from pipeline.runtime.display.progress import size_text

SHOWN = 4
"""Hosts that a line names."""
SURE = 0.8
"""Share of what the plan says that a step certainly needs: a plan is an estimate, and must not stop a job that fits."""


@dataclass(frozen=True)
class Finding:
    """One line."""

    what: str
    right: bool
    found: str
    fix: str = ""
    """What to do where it is wrong, or to be noted."""
    noted: bool = False
    """Right, but not as expected: worth a look, and no reason not to begin."""

    def __str__(self) -> str:
        level = "note" if self.noted else "ok" if self.right else "WRONG"
        fix = f"; {self.fix}" if level != "ok" else ""
        return f"{level:<6}{self.what + ':':<15}{self.found}{fix}"


def judge(facts: Sequence[Facts], needed: Needs | None) -> list[Finding]:
    """All but the network, in the order of reading. needed: None where the plan cannot tell."""
    found = [
        _hosts(facts),
        _same("commit", facts, [f.commit for f in facts], "bring all nodes to one commit: git pull"),
    ]
    found += [_versions(facts), *_paths(facts)]
    found += [_room("disk", facts, lambda f: f.disk_free, (needed.disk, ""), MORE_DISK)] if needed else []
    found += _memory(facts, needed) if needed else []
    return [*found, _devices(facts)]


ONE_ENVIRONMENT = (
    "use one environment on all nodes: a shared disk or a container; PATH chooses it: in .deepspeed_env for deepspeed "
    "--hostfile, by -x PATH for mpirun, in each node's shell for torchrun, in the shell that submits for SLURM, or in "
    "modules and environment of launch.submit's site file"
)
MORE_DISK = "make room, or move the run: --set run=FOLDER"


def _hosts(facts: Sequence[Facts]) -> Finding:
    ranks = [sum(f.host == host for f in facts) for host in _hosts_of(facts)]
    counts = sorted(set(ranks))
    text = f"{len(ranks)} reached, {' or '.join(map(str, counts))} ranks each: {_names(_hosts_of(facts))}"
    fix = "give each the same number: slots in the hostfile, or --ntasks-per-node"
    return Finding("hosts", len(counts) == 1, text, fix)


def _same(what: str, facts: Sequence[Facts], values: Sequence[str], fix: str) -> Finding:
    """values: of each rank."""
    hosts: dict[str, list[str]] = {}
    for f, value in zip(facts, values, strict=True):
        hosts.setdefault(value, []).append(f.host)
    if len(hosts) == 1:
        return Finding(what, True, values[0])
    return Finding(what, False, ", ".join(f"{value} on {_names(on)}" for value, on in hosts.items()), fix)


def _versions(facts: Sequence[Facts]) -> Finding:
    names = sorted({name for f in facts for name in f.versions})
    compared = {name: _same(name, facts, [f.versions.get(name, "none") for f in facts], "") for name in names}
    differing = [f"{name}: {finding.found}" for name, finding in compared.items() if not finding.right]
    if differing:
        return Finding("versions", False, "; ".join(differing), ONE_ENVIRONMENT)
    shown = ", ".join(f"{name} {facts[0].versions.get(name)}" for name in ("python", "torch", "deepspeed"))
    return Finding("versions", True, f"{shown}; {len(names)} packages the same everywhere")


def _paths(facts: Sequence[Facts]) -> list[Finding]:
    found = []
    for key in facts[0].paths:
        unseen = [f for f in facts if f.paths[key].startswith("no ")]
        if unseen:
            text = f"{unseen[0].paths[key]} on {_names([f.host for f in unseen])}"
            found.append(Finding(key, False, text, f"mount it there, or correct {key} in the recipe"))
        elif len({f.paths[key] for f in facts}) > 1:
            text = f"another file on {_names([f.host for f in facts if f.paths[key] != facts[0].paths[key]])}"
            fix = f"{key} must be on a disk that all nodes share, or be copied to all of them again"
            found.append(Finding(key, False, text, fix))
    seen = [key for key in facts[0].paths if key not in {finding.what for finding in found}]
    for key in facts[0].unwritable:
        if outside := [f for f in facts if f.unwritable[key]]:
            text = f"{outside[0].unwritable[key]} on {_names([f.host for f in outside])}"
            found.append(Finding(key, False, text, "all nodes must share this folder and be allowed to write there"))
        else:
            seen.append(f"{key} (written and read by all)")
    return [*([Finding("shared paths", True, ", ".join(seen))] if seen else []), *found]


def _memory(facts: Sequence[Facts], needed: Needs) -> list[Finding]:
    found = [
        _room("memory", facts, lambda f: f.memory, needed.memory, "lower data.workers or data.memory_mb"),
        _room("/dev/shm", facts, lambda f: f.shared_memory, needed.shared_memory,
              "lower data.workers, or give more: mount -o remount,size=64G /dev/shm; docker run --shm-size=64g"),
    ]  # fmt: skip
    if any(f.device_free is not None for f in facts):
        fix = "end what else runs there, or let python -m pipeline plan say which field of the recipe makes it fit"
        found.append(_room("GPU memory", facts, lambda f: f.device_free, needed.device, fix))
    return found


def _room(
    what: str, facts: Sequence[Facts], free: Callable[[Facts], int | None], need: tuple[int, str], fix: str
) -> Finding:
    size, step = need
    rooms: dict[str, int] = {}  # of a host's GPUs, the one that has least
    for f in facts:
        if (room := free(f)) is not None:
            rooms[f.host] = min(room, rooms.get(f.host, room))
    short = [host for host, room in rooms.items() if room < SURE * size]
    least = min(rooms.values(), default=0)
    wanted = f"{size_text(size)} needed{f' by {step}' if step else ''}"
    text = f"{size_text(least)} free, {wanted}" + (f", on {_names(short)}" if short else "")
    return Finding(what, not short, text, fix)


def _devices(facts: Sequence[Facts]) -> Finding:
    sick = [f for f in facts if f.device_problem]
    if sick:
        text = f"{sick[0].device} {sick[0].local_rank} of {sick[0].host}: {sick[0].device_problem}"
        fix = f"leave the node out and tell its keeper: sbatch --exclude={sick[0].host}, or strike it from the hostfile"
        return Finding("devices", False, text, fix)
    if shared := _shared_device(facts):
        fix = "each rank needs a GPU of its own: no more ranks of a node than GPUs, and no CUDA_VISIBLE_DEVICES of one"
        return Finding("devices", False, shared, fix)
    same = _same("devices", facts, [f.device for f in facts], "leave the odd nodes out, or the slowest sets the pace")
    if not same.right and "cpu" not in {f.device for f in facts}:  # two names of GPUs, such as H100 SXM and H100 PCIe
        return replace(same, right=True, noted=True)
    return same


def _shared_device(facts: Sequence[Facts]) -> str:
    users: dict[tuple[str, str], int] = {}
    for f in facts:
        if f.device_id and (first := users.setdefault((f.host, f.device_id), f.rank)) != f.rank:
            return f"ranks {first} and {f.rank} of {f.host} have the same GPU"
    return ""


def _hosts_of(facts: Iterable[Facts]) -> list[str]:
    return list(dict.fromkeys(f.host for f in facts))


def _names(hosts: Iterable[str]) -> str:
    names = list(dict.fromkeys(hosts))
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
