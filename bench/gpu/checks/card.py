"""The device, its ceilings, NCCL on one rank, and the losses on it against float64."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from bench.gpu.accuracy import add_accuracy
from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.shapes import Shapes
from bench.steps.startup import one_rank

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "accelerate", "datasets", "numpy")
ROUNDS = 7


def run(report: Report, device: Device, shapes: Shapes, place: Path) -> None:
    """Devices and versions first: they cannot fail."""
    report.detail("device", device.details())
    report.detail("versions", {name: _version(name) for name in PACKAGES})
    report.add("devices", torch.cuda.device_count() if device.is_cuda else 1)
    report.add("memory", device.memory_bytes() / 2**30, "GiB")
    report.add("matrix product", product_rate(device, shapes.product) / 1e12, "TFLOP/s", beside=_data_sheet(device))
    report.add("copy, read and written", _copy_rate(device, shapes.copy_mib) / 1e9, "GB/s")
    _collectives(report, device, shapes.copy_mib)
    add_accuracy(report, device, shapes)


def seconds_of(device: Device, work: Callable[[], object]) -> float:
    """Median wall seconds of a call, after one that is not counted."""
    times = []
    for _ in range(1 + ROUNDS):
        device.wait()
        begun = time.perf_counter()
        work()
        device.wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def product_rate(device: Device, side: int) -> float:
    """Operations a second of a square bfloat16 matrix product on random data."""
    left, right = (torch.randn(side, side, device=device.torch).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / seconds_of(device, lambda: torch.mm(left, right, out=out))


def _copy_rate(device: Device, mib: int) -> float:
    source = torch.randn(mib * 2**18, device=device.torch)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(device, lambda: target.copy_(source))


def _data_sheet(device: Device) -> str:
    rate = device.peak_rate()
    return f"data sheet {rate / 1e12:.0f}" if rate else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _collectives(report: Report, device: Device, mib: int) -> None:
    """The collectives that ZeRO-3 uses, on one rank: they start, give what they must, and take what the copy takes."""
    backend, begun = "nccl" if device.is_cuda else "gloo", time.perf_counter()
    os.environ |= one_rank()
    dist.init_process_group(backend)
    values = torch.randn(mib * 2**18, device=device.torch)
    whole, total = torch.zeros_like(values), values.clone()
    dist.all_reduce(total)
    device.wait()
    report.add(f"{backend}: from start to the first all-reduce", time.perf_counter() - begun, "s")
    dist.all_gather_into_tensor(whole, values)
    if not (torch.equal(total, values) and torch.equal(whole, values)):
        raise RuntimeError(f"{backend} on one rank: expected all-reduce and all-gather to return what they were given")
    report.add(f"{backend}: all-reduce, {mib} MiB", 1e3 * seconds_of(device, lambda: dist.all_reduce(total)), "ms")
    gather = 1e3 * seconds_of(device, lambda: dist.all_gather_into_tensor(whole, values))
    report.add(f"{backend}: all-gather, {mib} MiB", gather, "ms")
    dist.destroy_process_group()
