"""The machines that a plan is for, as the command line describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30

INSIDE = 200e9
"""Bytes a second that a GPU receives from the others of its node: half of what NVLink 4 can, as collectives do."""

RESERVED = 0.08
"""Share of a GPU's memory that is not for tensors: the CUDA context, NCCL's buffers, and gaps between blocks."""


@dataclass(frozen=True)
class Machine:
    """GPUs, their memory and speed."""

    gpus: int
    gpu_memory: float
    """Memory of one GPU in GiB."""
    gpus_per_node: int = 8
    tflops: float = 989.0
    """Peak of one GPU in bf16 matrix products, 10^12 operations a second. 989: H100 and H200; A100: 312."""
    utilisation: float = 0.4
    """Share of that peak that the steps reach while they compute."""
    network: float = 50.0
    """10^9 bytes a second that a GPU receives from other nodes. 50: a 400 Gbit/s adapter for each GPU."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Step -> response tokens a second of one GPU, measured."""

    @property
    def nodes(self) -> int:
        """Nodes that the GPUs fill."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.gpu_memory * GIB * (1 - RESERVED)

    @property
    def link(self) -> float:
        """Bytes a second of the slowest link of a collective over all GPUs."""
        return min(INSIDE, self.network * 1e9) if self.nodes > 1 else INSIDE
