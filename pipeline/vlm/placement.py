"""Which devices a frozen model runs on: one if it fits, else several with a part of its layers each.

Sizes in bytes. A device is a CUDA device's number; no device at all is the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn
from transformers import AutoModelForImageTextToText

from pipeline.errors import RecipeError
from pipeline.recipe.schema import ModelParts
from pipeline.vlm.config import read_config
from pipeline.vlm.parts import recognise

Devices = tuple[int, ...]
"""CUDA devices of one copy of a model; (): the CPU."""

WEIGHT_SHARE = 0.75
"""Largest share of free device memory that weights take; the rest is for activations and the key-value cache."""
PART_SHARE = 0.9
"""Largest share of one device's free memory that a part of a model takes: layers do not divide evenly."""


def empty_vlm(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model of the folder's config, without memory for its weights. Raises RecipeError if it is no VLM of ours."""
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(read_config(folder), dtype=dtype)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder} has no config of an image-text-to-text model: {error}") from error
    return model


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Size of a model's weights in memory, tied ones once. Reads its config only."""
    return sum(weight.nbytes for weight in empty_vlm(folder, dtype).parameters())


def device_groups(weights: int, free: Sequence[int], most: int | None = None) -> list[Devices]:
    """Devices of each copy of a model: as many copies as fit, at most `most`; free[i] is device i's free memory.

    Without devices there are `most` copies on the CPU, by default one. Devices are divided equally, in order. A copy
    that fits into the first device of its group uses that one alone; otherwise it uses the whole group.
    Raises RecipeError where not even all devices together have room, or there are fewer devices than `most`.
    """
    if not free:
        return [()] * (most or 1)
    if most is not None and most > len(free):
        raise RecipeError(f"--processes {most}: there are {len(free)} GPUs, and a process needs at least one")
    for copies in range(most or len(free), 0, -1):
        size = len(free) // copies
        groups = [tuple(range(start, start + size)) for start in range(0, copies * size, size)]
        if all(weights <= WEIGHT_SHARE * sum(free[device] for device in group) for group in groups):
            return [_fewest(weights, free, group) for group in groups]
    raise RecipeError(
        f"the weights take {_gb(weights)}, and the {len(free)} GPU(s) at hand have {', '.join(map(_gb, free))} free; "
        f"weights may take {WEIGHT_SHARE:.0%} of it. Free them (nvidia-smi shows who uses them) or use more GPUs"
    )


def check_fits_cpu(weights: int, available: int, copies: int) -> None:
    """Raise RecipeError where so many copies of the weights are more than the CPU's memory."""
    if copies * weights > available:
        raise RecipeError(
            f"there is no GPU, and {copies} x {_gb(weights)} of weights exceed the {_gb(available)} of memory that are "
            "available. Use GPUs, a machine with more memory, or fewer --processes"
        )


def device_map(
    folder: Path, dtype: torch.dtype, memory: Mapping[int, int], parts: ModelParts | None = None
) -> dict[str, int]:
    """{module name: device} that spreads a model evenly over devices; memory[d]: free memory of device d.

    parts: those that the recipe names. Decoder layers and the vision tower are never cut. Raises RecipeError where the
    pieces do not fit, though their sum does.
    """
    model: Any = empty_vlm(folder, dtype)
    towers = {type(model.get_submodule(name)).__name__ for name in recognise(model, parts).vision}
    whole = sorted({*model._no_split_modules, *towers})
    room = {device: int(PART_SHARE * free) for device, free in memory.items()}
    balanced = get_balanced_memory(model, max_memory=dict(room), no_split_module_classes=whole)
    found = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
    outside = sorted(name for name, device in found.items() if device not in memory)
    if outside:
        weights = sum(weight.nbytes for weight in model.parameters())
        raise RecipeError(
            f"{folder}: {_gb(weights)} of weights do not fit the devices {_devices(room)}, first {outside[0]}. Use "
            "more GPUs"
        )
    return found


def free_cuda_memory() -> list[int]:
    """Free memory of each CUDA device; empty without one. Takes some of each for this process, until it ends."""
    return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]


def available_cpu_memory() -> int:
    """Memory that a process without GPUs can still have."""
    return sum(get_max_memory().values())


def _fewest(weights: int, free: Sequence[int], group: Devices) -> Devices:
    return group[:1] if weights <= WEIGHT_SHARE * free[group[0]] else group


def _devices(memory: Mapping[int, int]) -> str:
    return ", ".join(f"{device} (room for {_gb(room)})" for device, room in memory.items())


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
