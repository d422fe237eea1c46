"""What ZeRO leaves on each rank, from a DeepSpeed config: shards, gathered weights, gradients, optimizer states.

Stages (Rajbhandari et al., 2020): 1 shards the optimizer states, 2 the gradients too, 3 the weights too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe.checks import load_deepspeed_config
from pipeline.results.plan.models import Parameter

MASTER_AND_MOMENTS = 12
"""Bytes an element of AdamW: float32 weight, first and second moment."""

WIDE = 4
"""Bytes of a float32 number."""


_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Zero:
    """What a plan reads in a DeepSpeed config. Sizes are numbers of elements; where it is silent, DeepSpeed's own."""

    path: Path
    stage: int
    bucket: int
    """Gradients that are reduced together."""
    prefetch: int
    """Weights that are gathered ahead of their use."""
    persistent: int
    """Smaller parameters stay whole on each rank."""
    reuse: int
    """Weights that are used again within this many elements stay gathered."""
    overlap: bool
    """Whether reducing runs beside the backward; stage 2 then has a second bucket."""
    offload_weights: str
    """Where the shards of the weights lie: "gpu", "cpu" or "nvme"."""
    offload_optimizer: str
    """Where master weights, moments and accumulated gradients lie."""
    group: int
    """Ranks of a node that hold all weights between them, so that none come from other nodes again
    (zero_hpz_partition_size); 1: none do."""
    sum_bytes: int
    """Bytes of an element of accumulated gradients: 4 unless data_types.grad_accum_dtype says otherwise."""
    reduce_bytes: int
    """Bytes of an element of gradients between ranks: 4 unless communication_data_type says otherwise."""


def read_zero(path: Path) -> Zero:
    """Raise RecipeError where there is no such file, or it is not JSON."""
    config = load_deepspeed_config(path)
    settings = config.get("zero_optimization", {})
    return Zero(
        path=path,
        stage=int(settings.get("stage", 0)),
        bucket=int(float(settings.get("reduce_bucket_size", 5e8))),
        prefetch=int(float(settings.get("stage3_prefetch_bucket_size", 5e7))),
        persistent=int(float(settings.get("stage3_param_persistence_threshold", 1e5))),
        reuse=int(float(settings.get("stage3_max_reuse_distance", 1e9))),
        overlap=bool(settings.get("overlap_comm", int(settings.get("stage", 0)) == 3)),
        offload_weights=_device(settings.get("offload_param")),
        offload_optimizer=_device(settings.get("offload_optimizer")),
        group=int(settings.get("zero_hpz_partition_size", 1)),
        sum_bytes=_BYTES[config.get("data_types", {}).get("grad_accum_dtype", "fp32")],
        reduce_bytes=_BYTES[config.get("communication_data_type", "fp32")],
    )


def _device(offload: Any) -> str:
    device = (offload or {}).get("device", "none")
    return "gpu" if device == "none" else str(device)


def shard(elements: int, ranks: int) -> int:
    """Elements of a parameter that one rank holds: the last rank's are padded."""
    return math.ceil(elements / ranks)


def shards(parameters: Sequence[Parameter], ranks: int) -> int:
    """Elements of all parameters' shards on one rank."""
    return sum(shard(parameter.elements, ranks) for parameter in parameters)


def weight_bytes(parameters: Sequence[Parameter], zero: Zero, ranks: int, width: int) -> int:
    """Weights that always lie on the GPU: shards, and whole copies of the small ones; all of them below stage 3."""
    if zero.stage < 3:
        return width * sum(parameter.elements for parameter in parameters)
    whole = sum(parameter.elements for parameter in parameters if parameter.elements < zero.persistent)
    lying = shards(parameters, ranks) if zero.offload_weights == "gpu" else 0
    secondary = shards(parameters, zero.group) if zero.group > 1 else 0
    return width * (lying + whole + secondary)


def optimizer_bytes(parameters: Sequence[Parameter], zero: Zero, ranks: int, width: int) -> int:
    """Master weights and moments of the trained parameters on one rank, wherever they lie.

    Without ZeRO float32 weights are their own masters.
    """
    trained = [parameter for parameter in parameters if parameter.trained]
    if zero.stage == 0 and width == WIDE:
        return 2 * WIDE * sum(parameter.elements for parameter in trained)
    return MASTER_AND_MOMENTS * shards(trained, ranks)


def gradient_bytes(parameters: Sequence[Parameter], zero: Zero, ranks: int) -> int:
    """Accumulated gradients on one rank: shards from stage 2 on, whole below."""
    trained = [parameter for parameter in parameters if parameter.trained]
    if zero.stage >= 2:
        return zero.sum_bytes * shards(trained, ranks)
    return zero.sum_bytes * sum(parameter.elements for parameter in trained)


def bucket_bytes(parameters: Sequence[Parameter], zero: Zero) -> int:
    """Memory in which gradients wait to be reduced: stage 3 has it always, stage 2 twice with overlap_comm."""
    if zero.stage < 2 or not any(parameter.trained for parameter in parameters):
        return 0
    return zero.reduce_bytes * zero.bucket * (2 if zero.stage == 2 and zero.overlap else 1)


def joined_bytes(parameters: Sequence[Parameter], zero: Zero) -> int:
    """The gradients of a full bucket once more: they are joined to be reduced."""
    small = sum(p.elements for p in parameters if p.trained and p.elements <= zero.bucket)
    return zero.reduce_bytes * min(small, zero.bucket) if zero.stage >= 2 else 0


def copied_bytes(elements: int, zero: Zero, width: int) -> int:
    """A copy of a gradient that no bucket holds, where ranks add in another format than the weights' of `width`."""
    alone = zero.stage >= 2 and elements > zero.bucket and zero.reduce_bytes != width
    return zero.reduce_bytes * elements if alone else 0


def update_bytes(parameters: Sequence[Parameter], zero: Zero, ranks: int) -> int:
    """A second copy of a group's gradients, at most 1e9 elements, while the optimizer moves: only from stage 2 on."""
    if zero.stage < 2 or zero.offload_optimizer != "gpu":
        return 0
    return WIDE * min(10**9, shards([parameter for parameter in parameters if parameter.trained], ranks))


def gathered_elements(sequence: Sequence[tuple[int, int]], zero: Zero) -> int:
    """The most elements that are gathered at a time, beyond what always lies whole.

    sequence: (number of the module, its elements without the small parameters), in the order of use in a micro-step,
    backward included. A module is let go when it is not used again within `reuse` elements; the next `prefetch`
    elements are gathered ahead (DeepSpeed's PartitionedParameterCoordinator).
    """
    ahead = [0]
    for _, elements in sequence:
        ahead.append(ahead[-1] + elements)
    uses: dict[int, list[int]] = {}
    for place, (module, _) in enumerate(sequence):
        uses.setdefault(module, []).append(place)
    changes = [0] * (len(sequence) + 1)
    for places in uses.values():
        elements = sequence[places[0]][1]
        start = places[0]
        for place, following in zip(places, [*places[1:], None], strict=True):
            if following is None or ahead[following] - ahead[place + 1] >= zero.reuse:
                changes[start] += elements
                changes[place + 1] -= elements
                start = following if following is not None else place
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    total = sum(sequence[places[0]][1] for places in uses.values())
    return min(total, peak + zero.prefetch)
