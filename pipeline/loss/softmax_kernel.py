"""One Triton kernel for all passes over the logits between a chunk's two matrix products. It saves GPU memory traffic.

Plain torch makes six passes: 36 bytes for each logit where the weight is bfloat16. This kernel reads the logits twice
and writes them once: 6 bytes (docs/numerics.md counts both, beside the matrix products). This module is imported only
where the kernel is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.signal import Unembedding

BLOCK = 4096
"""Ids that a program processes at a time. There is one program for each row."""


@triton.jit
def _softmax(
    products,
    marked_ids,
    marked_log_qs,
    tops,
    vocab,
    stride,
    scale,
    softcap,
    LABELLED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = products + row * stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    top_id = lanes
    for start in range(0, vocab, BLOCK):  # each lane keeps its own maximum, its id, and its sum of exp(z - maximum)
        ids = start + lanes
        z = tl.load(first + ids, mask=ids < vocab, other=0.0).to(tl.float32) * scale
        if CAPPED:
            z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
        z = tl.where(ids < vocab, z, float("-inf"))
        above = z > top
        total = tl.where(above, total * tl.exp(top - z) + 1.0, total + tl.where(ids < vocab, tl.exp(z - top), 0.0))
        top_id = tl.where(above, ids, top_id)
        top = tl.where(above, z, top)
    best = tl.max(top, 0)
    log_total = tl.log(tl.sum(total * tl.exp(top - best), 0))
    if LABELLED:
        marked_id = tl.load(marked_ids + row)
    else:
        marked_id = tl.min(tl.where(top == best, top_id, vocab), 0).to(tl.int64)
        tl.store(marked_ids + row, marked_id)
    marked_log_q = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        z = tl.load(first + ids, mask=ids < vocab, other=0.0).to(tl.float32) * scale
        slope = scale
        if CAPPED:
            capped = 2 * tl.sigmoid(2 * z / softcap) - 1
            z, slope = softcap * capped, scale * (1 - capped * capped)
        log_q = z - best - log_total
        marked = ids == marked_id
        marked_log_q += tl.where(marked, log_q, 0.0)
        gradient = tl.exp(log_q) - tl.where(marked, 1.0, 0.0) if LABELLED else tl.where(marked, 0.0, tl.exp(z - best))
        tl.store(first + ids, (gradient * slope).to(products.dtype.element_ty), mask=ids < vocab)
    found = tl.sum(marked_log_q, 0)
    if LABELLED:  # a label that no model has: the update is skipped, and its samples are named
        found = tl.where((marked_id >= 0) & (marked_id < vocab), found, float("nan"))
    tl.store(marked_log_qs + row, found)
    tl.store(tops + row, best)


def exp_without_top_(products: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor, Tensor]:
    """Turn h W^T + b [c, V] into exp(logit - largest logit) times the slope of scale and soft-cap, in place.

    The most likely id becomes 0. Returns that id (the lowest of equal ones), its log-probability, and its logit, [c, 1]
    each.
    """
    top_id = torch.empty(len(products), 1, dtype=torch.int64, device=products.device)
    return top_id, *_launch(products, unembedding, top_id, labelled=False)


def softmax_minus_label_(products: Tensor, unembedding: Unembedding, labels: Tensor) -> Tensor:
    """Turn h W^T + b [c, V] into (probabilities - onehot(labels [c])) times the slope, in place.

    Returns the labels' log-probabilities [c].
    """
    return _launch(products, unembedding, labels, labelled=True)[0][:, 0]


def _launch(products: Tensor, unembedding: Unembedding, marked: Tensor, labelled: bool) -> tuple[Tensor, Tensor]:
    rows, vocab = products.shape
    log_q, top = (torch.empty(rows, 1, device=products.device) for _ in range(2))
    with torch.cuda.device_of(products):  # Triton launches on the current GPU, whichever the tensors are on
        _softmax[(rows,)](
            products,
            marked,
            log_q,
            top,
            vocab,
            products.stride(0),
            unembedding.scale,
            unembedding.softcap or 0.0,
            LABELLED=labelled,
            CAPPED=unembedding.softcap is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return log_q, top
