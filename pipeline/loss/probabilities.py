"""A student layer's probabilities q, chunk by chunk: log q at requested ids, and the input of the next matrix product.

T response tokens, d width, V common vocabulary, c rows of a chunk, n requested ids, H heavy ids (those of largest q).
slope: the derivative of the head's scale and soft-cap. On a GPU, a single Triton kernel makes all passes over a chunk
(kernels.py says where).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.loss import kernels
from pipeline.loss.chunks import Gradients, Workspace, exp_, product_gradients, row_chunks, softmax_

BLOCK = 128
"""Ids in a block for `blocked_max`."""

Collect = Callable[[slice, Tensor, Tensor, Tensor], None]
"""Receives the results of some rows: (rows, heavy ids [c, H], log q [c, H + n], log-sum-exp [c, 1]).

log q is at the heavy ids, then at the requested ones."""


def probability_chunks(h: Tensor, workspace: Workspace, ids: Tensor, heavy: int, collect: Collect) -> Gradients:
    """q / max q times the slope, with 0 at the `heavy` ids of largest q. Collects log q of those and of `ids` [T, n].

    In naive form:

        logits = unembedding.logits(h)                                          # [T, V]
        heavy_ids = logits.topk(heavy).indices                                  # the most likely first
        collect(heavy_ids, logits.log_softmax(1).gather(1, cat(heavy_ids, ids)), logits.logsumexp(1))
        (logits - logits.amax(1)).exp().scatter(1, heavy_ids, 0) * slope
    """
    if heavy == 1 and kernels.fused(workspace.unembedding.weight):
        return _fused_probabilities(h, workspace, ids, collect)

    def relative_to_max(rows: slice, logits: Tensor) -> None:
        top, heavy_ids = logits.topk(heavy) if heavy > 1 else blocked_max(logits)
        log_q, log_sum, _ = exp_(logits, torch.cat((heavy_ids, ids[rows]), 1), top[:, :1])
        logits.scatter_(1, heavy_ids, 0.0)
        collect(rows, heavy_ids, log_q, log_sum)

    return product_gradients(h, workspace, relative_to_max)


def cross_entropy_chunks(
    h: Tensor, workspace: Workspace, labels: Tensor, collect: Callable[[slice, Tensor], None]
) -> Gradients:
    """The gradient of cross-entropy, (q - onehot(label)) times the slope. Collects log q of the labels [T].

    In naive form:

        logits = unembedding.logits(h)                                          # [T, V]
        collect(logits.log_softmax(1).gather(1, labels))
        (logits.softmax(1) - onehot(labels)) * slope
    """
    if kernels.fused(workspace.unembedding.weight):
        return _fused_cross_entropy(h, workspace, labels, collect)

    def softmax_minus_label(rows: slice, logits: Tensor) -> None:
        target = labels[rows, None]
        log_q = softmax_(logits, target)
        logits.scatter_add_(1, target, torch.full_like(log_q, -1.0))
        collect(rows, log_q[:, 0])

    return product_gradients(h, workspace, softmax_minus_label)


def blocked_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit and its id, [c, 1] each: `logits.max(1, keepdim=True)` in a third of the time.

    On a CPU, torch's max with indices is not vectorised, but amax is. So amax finds the maximum of each block, and the
    id is searched in one block only. Of equal logits, any id may be returned.
    """
    vocab = logits.shape[1]
    whole = vocab - vocab % BLOCK
    tops = [logits[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)] if whole else []
    if whole < vocab:
        tops.append(logits[:, whole:].amax(1, keepdim=True))
    top, block = torch.cat(tops, 1).max(1, keepdim=True)
    ids = (block * BLOCK + torch.arange(BLOCK, device=logits.device)).clamp_(max=vocab - 1)
    return top, ids.gather(1, logits.gather(1, ids).argmax(1, keepdim=True))


def _fused_probabilities(h: Tensor, workspace: Workspace, ids: Tensor, collect: Collect) -> Gradients:
    from pipeline.loss.softmax_kernel import exp_without_top_  # imported here, because Triton may not be installed

    for rows in row_chunks(len(h), workspace.chunk):
        products = workspace.products(h[rows])
        requested = workspace.unembedding.scale_and_cap_(products.gather(1, ids[rows]).float())
        top_id, top_log_q, top = exp_without_top_(products, workspace.unembedding)
        collect(rows, top_id, torch.cat((top_log_q, requested.sub_(top).add_(top_log_q)), 1), top - top_log_q)
        yield rows, products


def _fused_cross_entropy(
    h: Tensor, workspace: Workspace, labels: Tensor, collect: Callable[[slice, Tensor], None]
) -> Gradients:
    from pipeline.loss.softmax_kernel import softmax_minus_label_

    for rows in row_chunks(len(h), workspace.chunk):
        products = workspace.products(h[rows])
        collect(rows, softmax_minus_label_(products, workspace.unembedding, labels[rows]))
        yield rows, products
