"""Draw a systematic sample of each distribution from its logits, and compute the entropy.

c rows, V vocabulary, N points. In naive form:

    p = logits.softmax(1)[:, order].double()
    ranks = searchsorted(p.cumsum(1), (arange(N) + u) / N, right=True)                      # [c, N]
    entropy = -xlogy(p, p).sum(1)                                                           # [c]

The cumulative sum is first taken over blocks of ids, then inside the one block that a point falls into. A float64
cumulative sum over the whole vocabulary would take as long as the matrix product that made the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.signal import Unembedding

CPU_ELEMENTS = 2**20
"""Most elements of each temporary array on a CPU, so that they stay in its caches."""

ACCELERATOR_ELEMENTS = 2**26
"""The same on an accelerator. It is larger, because kernel launches cost time: 256 MiB each, twice that in float64."""

BLOCK = 128
"""Ids in a block. Probabilities are summed in float32 inside a block, and the blocks' sums in float64."""


def draw_points(
    products: Tensor, unembedding: Unembedding, order: Tensor, u: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """Products h W^T + b [c, V] -> ranks [c, N] int32 ascending (positions in `order`), entropy [c] float32 in nats.

    order: [V] the ids in their fixed order. u: [c] float64, uniform in [0, 1). Where a logit is not finite, the entropy
    is NaN.
    """
    rows, vocab = products.shape
    elements = CPU_ELEMENTS if products.device.type == "cpu" else ACCELERATOR_ELEMENTS
    # A row takes its logits, or one block for each of its points, whichever is more.
    rows_at_once = max(1, elements // max(vocab, points * BLOCK))
    # All rows share this memory. On a CPU, the page faults of fresh memory cost more than the passes over it.
    workspace = _Workspace(min(rows, rows_at_once), vocab, products.device)
    ranks = torch.empty(rows, points, dtype=torch.int32, device=products.device)
    entropy = torch.empty(rows, device=products.device)
    for start in range(0, rows, rows_at_once):
        part = slice(start, start + rows_at_once)
        logits = workspace.logits[: len(products[part])].copy_(products[part])
        ranks[part], entropy[part] = _draw(unembedding.scale_and_cap_(logits), workspace, order, u[part], points)
    return ranks, entropy


class _Workspace:
    """Memory for logits, weights and weights in the vocabulary order, reused for all rows."""

    def __init__(self, rows: int, vocab: int, device: torch.device):
        self.logits, self.weights = (torch.empty(rows, vocab, device=device) for _ in range(2))
        self.ordered = torch.zeros(rows, -(-vocab // BLOCK) * BLOCK, device=device)  # ids beyond V stay 0


def _draw(logits: Tensor, workspace: _Workspace, order: Tensor, u: Tensor, points: int) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    below_top = logits.sub_(logits.amax(1, keepdim=True))
    weights = torch.exp(below_top, out=workspace.weights[:rows])
    ordered = workspace.ordered[:rows]
    ordered[:, :vocab] = weights.index_select(1, order)
    blocks = ordered.unflatten(1, (-1, BLOCK))
    mass = blocks.sum(2).double().cumsum(1)
    total = mass[:, -1:].contiguous()
    positions = (torch.arange(points, device=u.device) + u[:, None]) / points * total
    # The last point may be rounded up to the total mass, and only ids of probability 0 lie beyond that. So points are
    # clamped to the block where the mass reaches the total. (Where a logit is NaN, the mass is NaN too. The rank is
    # then valid but meaningless, and the entropy is NaN, which shows it.)
    last = torch.searchsorted(mass, total).clamp(max=mass.shape[1] - 1)
    block = torch.searchsorted(mass, positions, right=True).clamp(max=last)
    before = torch.nn.functional.pad(mass, (1, 0)).gather(1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).cumsum(2, dtype=torch.float64)
    remainder, block_total = (positions - before)[..., None], within[..., -1:].contiguous()
    place = torch.searchsorted(within, remainder, right=True).minimum(torch.searchsorted(within, block_total))[..., 0]
    # -sum p log p with p = exp(z - top) / total. Both terms use the same float32 weights, so the rounding error of
    # their sum cancels.
    entropy = total[:, 0].log() - below_top.mul_(weights).sum(1).double() / total[:, 0]
    return (block * BLOCK + place).clamp(max=vocab - 1).int(), entropy.clamp(min=0).float()
