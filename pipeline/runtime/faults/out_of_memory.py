"""A rank that has no memory left: what it was doing, with what sizes, and which fields of the recipe help."""

from __future__ import annotations

import torch

from pipeline.recipe.schema import STEPS

SAID_BY_LIBRARIES = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")
"""Of errors that have no type of their own: torch's CPU allocator, cuBLAS, NCCL."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has too little memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(said in str(error) for said in SAID_BY_LIBRARIES)


def what_helps(error: BaseException, doing: str) -> str:
    """The message for the user. doing: what the rank did, with its sizes (watch.now)."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    said = doing.split(":")[0]
    step = said if said in STEPS else "STEP"
    smaller = "cache.batch_tokens" if step == "cache" else f"{step}.micro_batch_tokens (or .micro_batch_size)"
    stage_2 = "gradient_checkpointing: true; " if step in ("interact", "reinforce") else ""
    return (
        f"out of memory at {doing}: {first}. What needs less: a smaller {smaller}; {stage_2}weights or optimizer "
        "states in host memory (deepspeed: ds_configs/zero3_offload.json, zero3_offload_optimizer.json), or more ranks "
        "under zero3.json; in a new run also data.max_pixels and data.max_length. python -m pipeline plan --recipe "
        "RECIPE says what fits. With such a change the same command goes on from the last checkpoint"
    )
