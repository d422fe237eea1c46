"""Cross-entropy of a language head against labels, without storing all logits.

L layers, T response tokens, d width, V common vocabulary, c rows of a chunk. In naive form:

    log_probs = unembedding.logits(h).log_softmax(-1)                                   # [L, T, V]
    loss = -log_probs.gather(-1, labels.expand(L, T)[..., None]).sum((1, 2))            # [L]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.loss.chunks import Gradients, Workspace, head_loss
from pipeline.loss.probabilities import cross_entropy_chunks
from pipeline.signal import Unembedding


def linear_cross_entropy(h: Tensor, unembedding: Unembedding, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Cross-entropy in nats, summed over tokens: h [L, T, d] against labels [T] -> [L].

    Gradients reach h, and the weight and bias where these require one; L must then be 1.
    chunk: tokens in a chunk; None: as memory allows. T = 0 gives zeros with zero gradients.
    Raises ValueError for a label outside the vocabulary (checked on the CPU only) and for shapes that do not fit.
    """
    check_labels(h, unembedding, labels)

    def layer_gradients(h: Tensor, add_losses: Callable[[Tensor], None], workspace: Workspace) -> Gradients:
        return cross_entropy_chunks(h, workspace, labels, lambda rows, log_q: add_losses(-log_q))

    return head_loss(h, unembedding, layer_gradients, chunk)


@torch.no_grad()
def token_log_probs(h: Tensor, unembedding: Unembedding, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Log-probability in nats of each token's label, without gradient: h [L, T, d], labels [T] -> [L, T] float32."""
    check_labels(h, unembedding, labels)
    log_probs = torch.empty(h.shape[:2], dtype=torch.float32, device=h.device)
    workspace = Workspace(unembedding, chunk)
    for layer, layer_log_probs in zip(h, log_probs, strict=True):
        for _ in cross_entropy_chunks(layer, workspace, labels, layer_log_probs.__setitem__):
            pass  # the gradients are not needed
    return log_probs


def check_labels(h: Tensor, unembedding: Unembedding, labels: Tensor) -> None:
    """Raise ValueError for shapes that do not fit, and on the CPU for a label outside the vocabulary."""
    if h.dim() != 3 or labels.shape != h.shape[1:2]:
        raise ValueError(f"expected h [L, T, d] and labels [T], got {tuple(h.shape)} and {tuple(labels.shape)}")
    # Reading them from a device would wait for it. There plain torch's gather raises, and the kernel's loss is NaN.
    if not labels.numel() or labels.device.type != "cpu":
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= unembedding.vocab:
        raise ValueError(
            f"label ids run from {low} to {high}, the common vocabulary from 0 to {unembedding.vocab - 1}: "
            "gather the response tokens before the head; their ids must exist in both models"
        )
