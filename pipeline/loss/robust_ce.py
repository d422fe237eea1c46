"""Cross-entropy for labels that are partly wrong, without storing all logits.

L layers, T response tokens, d width, V common vocabulary, c rows of a chunk. In naive form, with p the label's
probability:

    log_probs = unembedding.logits(h).log_softmax(-1)                                   # [L, T, V]
    smoothed = -(1 - s) * log p - s * log_probs.mean(-1)                                # Szegedy et al., 2016
    generalised = (1 - p ** q) / q                                                      # Zhang and Sabuncu, 2018
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.loss.chunks import Gradients, Workspace, exp_, head_loss, product_gradients, softmax_
from pipeline.loss.linear_ce import check_labels
from pipeline.signal import Unembedding

TileLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [c, V], labels [c, 1]) -> losses [c]. Overwrites the logits with their gradient."""


def smoothed_cross_entropy(
    h: Tensor, unembedding: Unembedding, labels: Tensor, smoothing: float, chunk: int | None = None
) -> Tensor:
    """Cross-entropy in nats against labels of which a share is spread evenly over the vocabulary, summed: [L].

    smoothing: that share, s. Arguments, gradients and errors are otherwise those of linear_cross_entropy.
    """
    return _summed(h, unembedding, labels, partial(_smoothed, smoothing), chunk)


def generalised_cross_entropy(
    h: Tensor, unembedding: Unembedding, labels: Tensor, power: float, chunk: int | None = None
) -> Tensor:
    """(1 - p^q) / q of each label's probability p, summed over tokens: [L]. Without unit; as q -> 0, cross-entropy.

    power: q in (0, 1]. Each token's gradient is that of cross-entropy times p^q. Arguments, gradients and errors are
    otherwise those of linear_cross_entropy.
    """
    return _summed(h, unembedding, labels, partial(_generalised, power), chunk)


def _summed(h: Tensor, unembedding: Unembedding, labels: Tensor, loss: TileLoss, chunk: int | None) -> Tensor:
    check_labels(h, unembedding, labels)

    def layer_gradients(h: Tensor, add_losses: Callable[[Tensor], None], workspace: Workspace) -> Gradients:
        return product_gradients(h, workspace, lambda rows, logits: add_losses(loss(logits, labels[rows, None])))

    return head_loss(h, unembedding, layer_gradients, chunk)


def _smoothed(smoothing: float, logits: Tensor, target: Tensor) -> Tensor:
    mean, vocab = logits.mean(1), logits.shape[1]
    log_p, log_sum, total = exp_(logits, target)
    logits.div_(total).sub_(smoothing / vocab)
    logits.scatter_add_(1, target, torch.full_like(log_p, smoothing - 1.0))
    return (smoothing - 1.0) * log_p[:, 0] + smoothing * (log_sum[:, 0] - mean)


def _generalised(power: float, logits: Tensor, target: Tensor) -> Tensor:
    log_p = softmax_(logits, target)
    weight = (power * log_p).exp_()
    logits.scatter_add_(1, target, torch.full_like(log_p, -1.0)).mul_(weight)
    return -torch.expm1(power * log_p[:, 0]) / power
