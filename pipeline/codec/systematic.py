"""Systematic points of each distribution, drawn from logits, and its entropy.

c rows, V vocabulary, N points. What it equals:

    p = logits.softmax(1)[:, order].double()
    ranks = searchsorted(p.cumsum(1), (arange(N) + u) / N, right=True)                      # [c, N]
    entropy = -xlogy(p, p).sum(1)                                                           # [c]

The cumulative sum is that of blocks of ids, and then of the one block that a point falls into: a float64 sum over the
whole vocabulary would take as long as the product that made the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.signal import Unembedding

AT_ONCE = 2**20
"""Numbers that a CPU has of a kind at a time, for its caches."""

ACCELERATOR_AT_ONCE = 2**26
"""The same on an accelerator, where launches cost: 256 MiB each, in float64 twice that."""

BLOCK = 128
"""Ids whose probabilities are summed in float32 before they are summed in float64."""


def draw_points(
    products: Tensor, unembedding: Unembedding, order: Tensor, u: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """h W^T + b [c, V] and u [c] float64 -> ranks in the order [c, N] int32 ascending, entropy [c] float32 in nat.

    Where a logit is not finite the entropy is NaN.
    """
    rows, vocab = products.shape
    numbers = AT_ONCE if products.device.type == "cpu" else ACCELERATOR_AT_ONCE
    at_once = max(1, numbers // max(vocab, points * BLOCK))  # a row's logits, or the blocks that its points fall into
    # The same memory for all rows: fresh memory costs a CPU more, page by page, than the passes over it.
    space = _Workspace(min(rows, at_once), vocab, products.device)
    ranks = torch.empty(rows, points, dtype=torch.int32, device=products.device)
    entropy = torch.empty(rows, device=products.device)
    for start in range(0, rows, at_once):
        some = slice(start, start + at_once)
        logits = space.logits[: len(products[some])].copy_(products[some])
        ranks[some], entropy[some] = _draw(unembedding.scale_and_cap_(logits), space, order, u[some], points)
    return ranks, entropy


class _Workspace:
    def __init__(self, rows: int, vocab: int, device: torch.device):
        self.logits, self.weights = (torch.empty(rows, vocab, device=device) for _ in range(2))
        self.ordered = torch.zeros(rows, -(-vocab // BLOCK) * BLOCK, device=device)  # stays 0 beyond the vocabulary


def _draw(logits: Tensor, space: _Workspace, order: Tensor, u: Tensor, points: int) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    below_top = logits.sub_(logits.amax(1, keepdim=True))
    weights = torch.exp(below_top, out=space.weights[:rows])
    ordered = space.ordered[:rows]
    ordered[:, :vocab] = weights.index_select(1, order)
    blocks = ordered.unflatten(1, (-1, BLOCK))
    mass = blocks.sum(2).double().cumsum(1)
    whole = mass[:, -1:].contiguous()
    at = (torch.arange(points, device=u.device) + u[:, None]) / points * whole
    # The last point may be rounded up to the whole mass, behind which there are only ids of probability 0. (Where a
    # logit is not a number neither is the mass: the rank is then a valid one that means nothing, the entropy says so.)
    last = torch.searchsorted(mass, whole).clamp(max=mass.shape[1] - 1)
    block = torch.searchsorted(mass, at, right=True).clamp(max=last)
    before = torch.nn.functional.pad(mass, (1, 0)).gather(1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).cumsum(2, dtype=torch.float64)
    left, all_of_it = (at - before)[..., None], within[..., -1:].contiguous()
    place = torch.searchsorted(within, left, right=True).minimum(torch.searchsorted(within, all_of_it))[..., 0]
    # -sum p log p with p = exp(z - top) / whole: both parts from the same float32 weights, so that what rounding does
    # to their sum divides out.
    entropy = whole[:, 0].log() - below_top.mul_(weights).sum(1).double() / whole[:, 0]
    return (block * BLOCK + place).clamp(max=vocab - 1).int(), entropy.clamp(min=0).float()
