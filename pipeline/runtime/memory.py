"""How much memory a rank has taken."""

from __future__ import annotations

import psutil
import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that torch's tensors have taken there, elsewhere the process's own memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
