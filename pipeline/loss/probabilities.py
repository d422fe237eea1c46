"""What a student layer says, chunk by chunk: log q where it is asked for, and q, made fit for the product that follows.

T response tokens, d width, V common vocabulary, c rows of a chunk, n ids asked for, H heavy ids; slope: the derivative
of the head's scale and soft-cap. Where there is Triton and a GPU, a single kernel makes all passes over a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline.loss.chunks import Gradients, Workspace, exp_, product_gradients, row_chunks, softmax_

BLOCK = 128
"""Ids of which the largest logit is found first, when the largest of all is sought."""

Note = Callable[[slice, Tensor, Tensor, Tensor], None]
"""(rows, heavy ids [c, H], log q of them and of the ids asked for [c, H + n], log-sum-exp [c, 1])."""


def probability_chunks(h: Tensor, workspace: Workspace, ids: Tensor, heavy: int, note: Note) -> Gradients:
    """q / max q times the slope, 0 at the ids of largest q; log q of those and of `ids` [T, n] is noted.

    What it equals:

        logits = unembedding.logits(h)                                          # [T, V]
        heavy_ids = logits.topk(heavy).indices                                  # the likeliest first
        note(heavy_ids, logits.log_softmax(1).gather(1, cat(heavy_ids, ids)), logits.logsumexp(1))
        (logits - logits.amax(1)).exp().scatter(1, heavy_ids, 0) * slope
    """
    if heavy == 1 and fusible(workspace.unembedding.weight):
        return _fused_probabilities(h, workspace, ids, note)

    def over_the_largest(rows: slice, logits: Tensor) -> None:
        top, heavy_ids = logits.topk(heavy) if heavy > 1 else likeliest(logits)
        log_q, log_sum, _ = exp_(logits, torch.cat((heavy_ids, ids[rows]), 1), top[:, :1])
        logits.scatter_(1, heavy_ids, 0.0)
        note(rows, heavy_ids, log_q, log_sum)

    return product_gradients(h, workspace, over_the_largest)


def cross_entropy_chunks(
    h: Tensor, workspace: Workspace, labels: Tensor, note: Callable[[slice, Tensor], None]
) -> Gradients:
    """(q - onehot(label)) times the slope; log q of the labels [T] is noted: cross-entropy's gradient and loss.

    What it equals:

        logits = unembedding.logits(h)                                          # [T, V]
        note(logits.log_softmax(1).gather(1, labels))
        (logits.softmax(1) - onehot(labels)) * slope
    """
    if fusible(workspace.unembedding.weight):
        return _fused_cross_entropy(h, workspace, labels, note)

    def softmax(rows: slice, logits: Tensor) -> None:
        target = labels[rows, None]
        log_q = softmax_(logits, target)
        logits.scatter_add_(1, target, torch.full_like(log_q, -1.0))
        note(rows, log_q[:, 0])

    return product_gradients(h, workspace, softmax)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest value and an id of it, [c, 1] each: `logits.max(1, keepdim=True)` at a third of its time.

    That looks at one number at a time. The maxima of blocks are vectorised; an index is then sought in one block only.
    """
    vocab = logits.shape[1]
    whole = vocab - vocab % BLOCK
    tops = [logits[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)] if whole else []
    if whole < vocab:
        tops.append(logits[:, whole:].amax(1, keepdim=True))
    top, block = torch.cat(tops, 1).max(1, keepdim=True)
    ids = (block * BLOCK + torch.arange(BLOCK, device=logits.device)).clamp_(max=vocab - 1)
    return top, ids.gather(1, logits.gather(1, ids).argmax(1, keepdim=True))


def fusible(weight: Tensor) -> bool:
    """Whether the passes between two products may be one kernel."""
    return weight.is_cuda and weight.dtype != torch.float64 and find_spec("triton") is not None


def _fused_probabilities(h: Tensor, workspace: Workspace, ids: Tensor, note: Note) -> Gradients:
    from pipeline.loss.softmax_kernel import exp_without_top_  # only here: Triton may be missing

    for rows in row_chunks(len(h), workspace.chunk):
        products = workspace.products(h[rows])
        asked = workspace.unembedding.scale_and_cap_(products.gather(1, ids[rows]).float())
        top_id, top_log_q, top = exp_without_top_(products, workspace.unembedding)
        note(rows, top_id, torch.cat((top_log_q, asked.sub_(top).add_(top_log_q)), 1), top - top_log_q)
        yield rows, products


def _fused_cross_entropy(
    h: Tensor, workspace: Workspace, labels: Tensor, note: Callable[[slice, Tensor], None]
) -> Gradients:
    from pipeline.loss.softmax_kernel import softmax_minus_label_

    for rows in row_chunks(len(h), workspace.chunk):
        products = workspace.products(h[rows])
        note(rows, softmax_minus_label_(products, workspace.unembedding, labels[rows]))
        yield rows, products
