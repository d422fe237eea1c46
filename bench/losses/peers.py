"""Loss implementations for comparison: plain dense torch, and chunked divergences of other packages.

T response tokens, d width, V vocabulary, J candidate teacher layers. Each does the work of one student layer, which
follows one of its J candidates: J divergences, then the gradient of the drawn one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from pipeline.signal import SparseSignal


def dense(signal: SparseSignal, column: int, vocab: int) -> Tensor:
    """One teacher layer's probabilities [T, V] float32."""
    probs = torch.zeros(len(signal.ids), vocab, device=signal.ids.device)
    return probs.scatter_add_(1, signal.ids[:, column], signal.probs[:, column])


def naive(h: Tensor, weight: Tensor, signal: SparseSignal, columns: range, drawn: int) -> Tensor:
    """A dense divergence, as in most libraries, called for each pair; autograd does the rest. KL [J]."""
    logits = linear(h, weight)

    def divergence(column: int) -> Tensor:
        return kl_div(logits.float().log_softmax(-1), dense(signal, column, len(weight)), reduction="sum")

    values = torch.stack([divergence(column) for column in columns])
    values[columns.index(drawn)].backward()
    return values.detach()


def naive_shared(h: Tensor, weight: Tensor, signal: SparseSignal, columns: range, drawn: int) -> Tensor:
    """The same, with one log-softmax for all candidates."""
    log_q = linear(h, weight).float().log_softmax(-1)
    values = torch.stack([kl_div(log_q, dense(signal, column, len(weight)), reduction="sum") for column in columns])
    values[columns.index(drawn)].backward()
    return values.detach()


def naive_frugal(h: Tensor, weight: Tensor, signal: SparseSignal, columns: range, drawn: int) -> Tensor:
    """The same, but only the drawn candidate keeps an autograd graph: dense torch at its best."""
    log_q = linear(h, weight).float().log_softmax(-1)
    values = []
    for column in columns:
        with torch.set_grad_enabled(column == drawn):
            values.append(kl_div(log_q, dense(signal, column, len(weight)), reduction="sum"))
    values[columns.index(drawn)].backward()
    return torch.stack(values).detach()


def naive_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Dense torch cross-entropy with the labels, for one layer."""
    loss = cross_entropy(linear(h, weight).float(), labels, reduction="sum")
    loss.backward()
    return loss.detach()


def trl_pair(h: Tensor, weight: Tensor, hidden: Tensor) -> Callable[[bool], Tensor]:
    """TRL's chunked divergence (its DistillationTrainer) at beta = 0, for one pair, with or without the backward.

    It does not support a cached teacher: the teacher's logits are a product of `hidden` [T, d] and, here, the same
    weight.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(backward: bool) -> Tensor:
        with torch.set_grad_enabled(backward):
            loss = ChunkedDivergenceFunction.apply(h, weight, None, hidden, weight, None, 0.0)[0].sum()
        if backward:
            loss.backward()
        return loss.detach()

    return run


def liger_pair(h: Tensor, weight: Tensor, hidden: Tensor) -> Callable[[], Tensor]:
    """Liger's chunked divergence (plain torch, not compiled) at beta = 0, for one pair.

    It does not support a cached teacher either. It computes all gradients in the forward, including that of a frozen
    weight.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=256)
    labels = torch.zeros(len(h), dtype=torch.int64, device=h.device)

    def run() -> Tensor:
        loss = loss_of(h, weight, hidden, weight, labels)
        loss.backward()
        return loss.detach()

    return run


def liger_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Liger's fused linear cross-entropy, summed. Its kernel is written in Triton and needs a GPU."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_of = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def run() -> Tensor:
        loss = loss_of(weight, h, labels)
        loss.backward()
        return loss.detach()

    return run


def cut_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Apple's cut cross-entropy, summed, with every logit's gradient kept. Its kernels are in Triton and need a GPU."""
    from cut_cross_entropy import linear_cross_entropy

    def run() -> Tensor:
        loss = linear_cross_entropy(h, weight, labels, reduction="sum", filter_eps=None)
        loss.backward()
        return loss.detach()

    return run
