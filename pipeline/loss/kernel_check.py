"""Checks the fused kernel against plain torch, on the device and in the dtype of a run. It takes milliseconds.

In naive form, for products h W^T + b [c, V] in some dtype:

    logits = softcap(scale * products.double())
    exp_without_top_       -> (logits - logits.amax(1)).exp() * slope, 0 at the most likely id
    softmax_minus_label_   -> (logits.softmax(1) - onehot(labels)) * slope

The vocabulary is no multiple of what a program processes at a time, and rows lie further apart than they are long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from pipeline.signal import Unembedding

ROWS, VOCAB, STRIDE = 3, 4133, 4140

SCALE_AND_CAP = ((1.0, None), (1.7, 4.0))

ABSOLUTE = 1e-5
"""Allowed difference: a few float32 roundings of a logit, which is at most 30 here."""


class Kernel(Protocol):
    """The two functions of softmax_kernel.py."""

    def exp_without_top_(self, products: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor, Tensor]:
        """See softmax_kernel.py."""

    def softmax_minus_label_(self, products: Tensor, unembedding: Unembedding, labels: Tensor) -> Tensor:
        """See softmax_kernel.py."""


Results = Iterator[tuple[str, Tensor, Tensor]]
"""(what it is, as the kernel has it, as plain torch has it in float64)."""


@torch.no_grad()
def difference(kernel: Kernel, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The first result in which the kernel differs from plain torch, with both numbers; None where there is none."""
    for scale, softcap in SCALE_AND_CAP:
        head = Unembedding(torch.empty(0, 0), VOCAB, None, scale, softcap)  # the kernel gets the products ready made
        for results in (_exponentials, _softmax_minus_label):
            for what, found, expected in results(kernel, head, _products(device, dtype)):
                if (fault := _first_difference(found, expected)) is not None:
                    return f"{what} at scale {scale}, soft-cap {softcap}, {dtype}: {fault}"
    return None


def _products(device: torch.device | str, dtype: torch.dtype) -> Tensor:
    products = 4 * torch.randn(ROWS, STRIDE, generator=torch.Generator().manual_seed(0))
    products[0, VOCAB - 1] = 30.0  # a confident row, whose most likely id is the last one
    return products.to(device, dtype)[:, :VOCAB]


def _logits_and_slope(products: Tensor, head: Unembedding) -> tuple[Tensor, Tensor]:
    logits = head.scale_and_cap_(products.double())
    slope = torch.ones_like(logits) if head.softcap is None else 1 - (logits / head.softcap).square()
    return logits, slope * head.scale


def _exponentials(kernel: Kernel, head: Unembedding, products: Tensor) -> Results:
    logits, slope = _logits_and_slope(products, head)
    top_id, top_log_q, top = kernel.exp_without_top_(products, head)
    top_id, best = top_id.clamp(0, VOCAB - 1), logits.amax(1, keepdim=True)  # a wrong id must not end the process
    yield "the largest logit", top, best
    yield "the logit of the most likely id", logits.gather(1, top_id), best
    yield "the log-probability of the most likely id", top_log_q, best - logits.logsumexp(1, keepdim=True)
    yield "exp(logit - largest)", products, ((logits - best).exp() * slope).scatter(1, top_id, 0.0)


def _softmax_minus_label(kernel: Kernel, head: Unembedding, products: Tensor) -> Results:
    logits, slope = _logits_and_slope(products, head)
    labels = torch.tensor([0, VOCAB // 2, VOCAB - 1], device=products.device)
    log_q = kernel.softmax_minus_label_(products, head, labels)
    yield "a label's log-probability", log_q, logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    gradient = logits.softmax(1).scatter_add(1, labels[:, None], torch.full_like(slope[:, :1], -1.0))
    yield "the gradient of cross-entropy", products, gradient * slope


def _first_difference(found: Tensor, expected: Tensor) -> str | None:
    """The worst element, as text, if it differs by more than roundings. NaN differs."""
    relative = max(torch.finfo(found.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    excess = (found.double() - expected).abs() - (relative * expected.abs() + ABSOLUTE)
    if bool((excess <= 0).all()):
        return None
    worst = excess.nan_to_num(nan=torch.inf).argmax()
    return f"{found.flatten()[worst].item():.6g}, plain torch {expected.flatten()[worst].item():.6g}"
