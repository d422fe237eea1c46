"""What a student layer says, chunk by chunk: log q at the ids that are asked for, and q for the product that follows.

T response tokens, d width, V common vocabulary, c rows of a chunk, n ids asked for, H heavy ids. What it equals:

    logits = unembedding.logits(h)                                          # [T, V]
    heavy_ids = logits.topk(H).indices
    note(heavy_ids, logits.log_softmax(1).gather(1, cat(heavy_ids, ids)), logits.logsumexp(1))
    yield logits.softmax(1) * slope, but 0 at heavy_ids                     # slope: that of scale and soft-cap
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline.loss.chunks import chunk_products, logits_of, product_gradients, row_chunks, rows_per_chunk, softmax_
from pipeline.teacher.signal import Unembedding

Note = Callable[[slice, Tensor, Tensor, Tensor], None]
"""(rows, heavy ids [c, H], log q of them and of the ids asked for [c, H + n], log-sum-exp [c, 1])."""


def probability_chunks(
    h: Tensor, unembedding: Unembedding, ids: Tensor, heavy: int, note: Note, chunk: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """For each chunk of h [T, d]: its rows, and q times the slope [c, V] in the weight's dtype, 0 at the heavy ids.

    ids: [T, n]. `note` is called, for a part of a chunk at a time, before the chunk is yielded. The one heavy id that
    a signal without a tail needs is found by a single kernel where there is Triton and a GPU.
    """
    if heavy == 1 and fusible(unembedding.weight):
        return _fused(h, unembedding, ids, note, chunk)

    def softmax(rows: slice, logits: Tensor) -> None:
        top, heavy_ids = logits.topk(heavy) if heavy > 1 else logits.max(1, keepdim=True)
        noted = softmax_(logits, torch.cat((heavy_ids, ids[rows]), 1), top[:, :1])
        logits.scatter_(1, heavy_ids, 0.0)
        note(rows, heavy_ids, *noted)

    return product_gradients(h, unembedding, softmax, chunk)


def fusible(weight: Tensor) -> bool:
    """Whether the passes between the two products may be one kernel."""
    return weight.is_cuda and weight.dtype != torch.float64 and find_spec("triton") is not None


def _fused(
    h: Tensor, unembedding: Unembedding, ids: Tensor, note: Note, chunk: int | None
) -> Iterator[tuple[slice, Tensor]]:
    from pipeline.loss.softmax_kernel import softmax_without_top_  # only here: Triton may be missing

    for rows in row_chunks(len(h), chunk or rows_per_chunk(unembedding.vocab)):
        products = chunk_products(h[rows], unembedding)
        asked = logits_of(products.gather(1, ids[rows]), unembedding)
        top_id, top_log_q, log_sum = softmax_without_top_(products, unembedding)
        note(rows, top_id, torch.cat((top_log_q, asked - log_sum), 1), log_sum)
        yield rows, products
