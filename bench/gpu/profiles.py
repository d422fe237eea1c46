"""A profile of one call: its ten dearest kernels, and the share of its time in which the device was idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import profile

from bench.gpu.device import Device

DEAREST = 10
NAME_LENGTH = 90
"""Characters of a kernel's name that are kept: a template's can have thousands."""
Span = tuple[float, float]
"""Begin and end, in microseconds."""


def profiled(device: Device, work: Callable[[], object], seconds: float) -> dict[str, Any]:
    """{"wall_ms", "idle_share", "kernels": [{"name", "ms", "share", "calls"}]} of one call that has run before.

    seconds: what the call takes without the profiler, which slows the host down but not the kernels: idle is what they
    leave of it. share: of all kernels' time. On a CPU an operation counts without those that it calls.
    """
    events = _events(device, work)
    busy_us = covered((event.time_range.start, event.time_range.end) for event in events)
    return {
        "wall_ms": round(1e3 * seconds, 3),
        "idle_share": round(max(0.0, 1 - busy_us / 1e6 / seconds), 4),
        "kernels": dearest([(event.name, _own_us(device, event)) for event in events]),
    }


def ran(device: Device, work: Callable[[], object]) -> set[str]:
    """Names of the kernels that a call runs."""
    return {event.name for event in _events(device, work)}


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans, which may overlap: kernels run side by side."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def dearest(events: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """The kernels that took the most time in all, from (name, microseconds) of each of their calls."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, spent_us in events:
        times[name[:NAME_LENGTH]].append(spent_us)
    whole = sum(map(sum, times.values())) or 1.0
    first = sorted(times.items(), key=lambda item: -sum(item[1]))[:DEAREST]
    return [
        {"name": name, "ms": round(sum(us) / 1e3, 3), "share": round(sum(us) / whole, 4), "calls": len(us)}
        for name, us in first
    ]


def _events(device: Device, work: Callable[[], object]) -> list[Any]:
    device.wait()
    with profile(activities=device.activities()) as recorded:
        work()
        device.wait()
    return [event for event in recorded.events() or [] if device.ran_here(event)]


def _own_us(device: Device, event: Any) -> float:
    return event.time_range.elapsed_us() if device.is_cuda else event.self_cpu_time_total
