"""Clipping of gradients that have nothing to do with one another: each by its own norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.runtime.ranks import sum_over_ranks


def part_norms(parts: Sequence[Sequence[Tensor]], sharded: bool) -> Tensor:
    """The norm of each part's gradient, in float64: [parts].

    parts: for each part, what this rank has of its gradients. sharded: whether each rank has its own share of them, so
    that all ranks must call; else each has the whole.
    """
    squares = torch.stack([sum_of_squares(part) for part in parts])
    return (sum_over_ranks(squares) if sharded else squares).sqrt()


def sum_of_squares(part: Sequence[Tensor]) -> Tensor:
    """In float64, without a copy of any tensor in it."""
    norms = torch.stack([torch.linalg.vector_norm(share, dtype=torch.float32) for share in part])
    return norms.double().square().sum()


def clip_factors(norms: Tensor, limit: float) -> Tensor:
    """What each part's gradient is multiplied by, at most 1, so that no norm is above the limit; limit 0: no clipping.

    The formula is torch.nn.utils.clip_grad_norm_'s.
    """
    return (limit / (norms + 1e-6)).clamp(max=1) if limit else torch.ones_like(norms)
