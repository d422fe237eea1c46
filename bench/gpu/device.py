"""What differs between a CUDA device and a CPU: waiting, memory, the profiler. No other file of this folder knows."""

from __future__ import annotations

import gc
import platform
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

PEAK_BF16 = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations a second by the makers' data sheets; the first name that the device's name contains."""


class Device:
    """The device of a check."""

    def __init__(self, kind: str):
        """kind: "cuda" (the first visible device) or "cpu"."""
        self.kind = kind
        self.torch = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.kind == "cuda"

    @property
    def name(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name(self.torch) if self.is_cuda else f"CPU ({platform.machine()})"

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def memory_bytes(self) -> int:
        """The device's whole memory."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.torch).total_memory
        return int(Path("/proc/meminfo").read_text().split()[1]) * 1024

    def free_memory(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def used_bytes(self) -> int:
        """Memory in use now: allocated by torch; on a CPU, resident of the whole process."""
        return torch.cuda.memory_allocated(self.torch) if self.is_cuda else _status_bytes("VmRSS")

    def reset_peak(self) -> None:
        """Begin to measure `peak_bytes` anew."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """The most of `used_bytes` since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.torch) if self.is_cuda else _status_bytes("VmHWM")

    def peak_rate(self) -> float | None:
        """Dense bfloat16 operations a second by the data sheet; None for a device that is not in the table."""
        return next((rate for part, rate in PEAK_BF16.items() if self.is_cuda and part in self.name), None)

    def activities(self) -> list[ProfilerActivity]:
        """What torch's profiler has to record: a GPU's kernels alone, for the host's part takes seconds to read."""
        return [ProfilerActivity.CUDA if self.is_cuda else ProfilerActivity.CPU]

    def ran_here(self, event: Any) -> bool:
        """Whether a profiler's event is work of this device; a user's annotation covers work, and is none."""
        kind = DeviceType.CUDA if self.is_cuda else DeviceType.CPU
        return event.device_type == kind and not event.is_user_annotation

    def details(self) -> dict[str, Any]:
        """Versions and properties for the report."""
        found: dict[str, Any] = {"device": self.name, "memory_gib": round(self.memory_bytes() / 2**30, 1)}
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.torch)
            found |= {
                "count": torch.cuda.device_count(),
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
                "cudnn": torch.backends.cudnn.version(),
            }
        return found


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
