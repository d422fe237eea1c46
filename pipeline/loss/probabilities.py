"""What a student layer says, chunk by chunk: log q where it is asked for, and q, made fit for the product that follows.

T response tokens, d width, V common vocabulary, c rows of a chunk, n ids asked for, H heavy ids; slope: the derivative
of the head's scale and soft-cap. Where there is Triton and a GPU, a single kernel makes all passes over a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline.loss.chunks import (
    Gradients,
    chunk_products,
    logits_of,
    product_gradients,
    row_chunks,
    rows_per_chunk,
    softmax_,
)
from pipeline.teacher.signal import Unembedding

Note = Callable[[slice, Tensor, Tensor, Tensor], None]
"""(rows, heavy ids [c, H], log q of them and of the ids asked for [c, H + n], log-sum-exp [c, 1])."""


def probability_chunks(
    h: Tensor, unembedding: Unembedding, ids: Tensor, heavy: int, note: Note, chunk: int | None = None
) -> Gradients:
    """q times the slope, 0 at the ids of largest q; log q of those and of `ids` [T, n] is noted. What it equals:

    logits = unembedding.logits(h)                                          # [T, V]
    heavy_ids = logits.topk(heavy).indices
    note(heavy_ids, logits.log_softmax(1).gather(1, cat(heavy_ids, ids)), logits.logsumexp(1))
    logits.softmax(1).scatter(1, heavy_ids, 0) * slope
    """
    if heavy == 1 and fusible(unembedding.weight):
        return _fused_probabilities(h, unembedding, ids, note, chunk)

    def softmax(rows: slice, logits: Tensor) -> None:
        top, heavy_ids = logits.topk(heavy) if heavy > 1 else logits.max(1, keepdim=True)
        noted = softmax_(logits, torch.cat((heavy_ids, ids[rows]), 1), top[:, :1])
        logits.scatter_(1, heavy_ids, 0.0)
        note(rows, heavy_ids, *noted)

    return product_gradients(h, unembedding, softmax, chunk)


def surprise_chunks(
    h: Tensor,
    unembedding: Unembedding,
    labels: Tensor,
    note: Callable[[slice, Tensor], None],
    chunk: int | None = None,
) -> Gradients:
    """(q - onehot(label)) times the slope; log q of the labels [T] is noted: cross-entropy's gradient and loss.

    What it equals:

        logits = unembedding.logits(h)                                          # [T, V]
        note(logits.log_softmax(1).gather(1, labels))
        (logits.softmax(1) - onehot(labels)) * slope
    """
    if fusible(unembedding.weight):
        return _fused_surprise(h, unembedding, labels, note, chunk)

    def softmax(rows: slice, logits: Tensor) -> None:
        target = labels[rows, None]
        log_q, _ = softmax_(logits, target)
        logits.scatter_add_(1, target, torch.full_like(log_q, -1.0))
        note(rows, log_q[:, 0])

    return product_gradients(h, unembedding, softmax, chunk)


def fusible(weight: Tensor) -> bool:
    """Whether the passes between two products may be one kernel."""
    return weight.is_cuda and weight.dtype != torch.float64 and find_spec("triton") is not None


def _fused_probabilities(h: Tensor, unembedding: Unembedding, ids: Tensor, note: Note, chunk: int | None) -> Gradients:
    from pipeline.loss.softmax_kernel import softmax_without_top_  # only here: Triton may be missing

    for rows in row_chunks(len(h), chunk or rows_per_chunk(unembedding.vocab)):
        products = chunk_products(h[rows], unembedding)
        asked = logits_of(products.gather(1, ids[rows]), unembedding)
        top_id, top_log_q, log_sum = softmax_without_top_(products, unembedding)
        note(rows, top_id, torch.cat((top_log_q, asked - log_sum), 1), log_sum)
        yield rows, products


def _fused_surprise(
    h: Tensor, unembedding: Unembedding, labels: Tensor, note: Callable[[slice, Tensor], None], chunk: int | None
) -> Gradients:
    from pipeline.loss.softmax_kernel import softmax_minus_label_

    for rows in row_chunks(len(h), chunk or rows_per_chunk(unembedding.vocab)):
        products = chunk_products(h[rows], unembedding)
        note(rows, softmax_minus_label_(products, unembedding, labels[rows]))
        yield rows, products
